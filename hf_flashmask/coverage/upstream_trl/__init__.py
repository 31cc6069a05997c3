"""TRL's own trainer tests as a judge: run from a checkout of TRL, with its attention and then with ours.

``standins`` builds what the tests would load from the hub, ``plugin`` is given to pytest, ``__main__`` runs the tests
under each attention and compares. docs/trl_tests.md has the command and what it found.
"""
