"""A fault campaign against the command line and `from_pretrained`: rough ends, rivals, odd configs, weights
and words, damage.

    python -m tests.campaign [--scale 1] [--seed 0] [--only kills pairs configs journals artefacts weights
    words]

Each part draws its cases from a seed, says what must hold after each of them, and counts. A fault is printed
with what made it; the exit code is 1 where there is one. tests/test_campaign.py runs a small one.
"""
