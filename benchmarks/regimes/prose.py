"""What was read from the committed records, in words; docs/evidence.md without its figures."""

INTRODUCTION = """\
# Evidence: the regimes in small

Written by `python benchmarks/regimes/evidence.py` from the records under `benchmarks/results/regimes`, which
`python benchmarks/regimes/run.py` took ({seeds}; {minutes} core minutes; {device}; torch {torch};
commit {commit}).
"""
DIFFERENCES = CLAIMS = DOMINATED = TRAINING = LEARNED = HISTOGRAMS = CALIBRATION = MASS = LIMITS = ""
RATES = "{top1:+.2f} {nll:+.2f}"
SGD = "{top1:+.2f} {nll:+.2f}"
