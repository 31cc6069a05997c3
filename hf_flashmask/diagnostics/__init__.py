"""What a bug report needs (``flashmask env``), a self-test (``check``) and drawn masks (``show``)."""
