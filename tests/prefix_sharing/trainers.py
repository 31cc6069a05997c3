"""TRL's stock trainers around tiny models, on the CPU in float32."""

from trl import DPOConfig, DPOTrainer

from hf_flashmask import share_prompts


def dpo_trainer(model, reference, dataset, tokenizer, folder, *, share, **options):
    """(trainer, handles of the policy and the reference; none unless ``share``)."""
    handles = [share_prompts(m) for m in (model, reference)] if share else []
    defaults = {"per_device_train_batch_size": 4, "gradient_checkpointing": False}
    arguments = DPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **{**defaults, **options}
    )
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=arguments, train_dataset=dataset, processing_class=tokenizer
    )
    return trainer, handles
