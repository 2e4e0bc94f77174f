"""What was read from the committed records, in words; docs/evidence.md without its figures."""

INTRODUCTION = """\
# Evidence: the regimes in small

Does the gate do what [the paper](https://arxiv.org/abs/2602.11424) says, at a size that anyone can run? Seven
objectives on strong, intermediate, weak and mixed data, {seeds}, the learning rate of every objective chosen on
validation data from one grid. Read it for directions, not for scores: the model has 165,000 parameters.

What to take from it:

- Labels right and the domain known: no objective but `neg_prob` is more than 0.6 points of top-1 from cross-entropy,
  and cross-entropy has the best loss. There is little to gain.
- Labels wrong: the gates win, by a point where 30 % are.
- The domain unknown: `neg_prob` falls 20 to 37 points behind, `deft` one to four; `cayley` is level with cross-entropy
  on the cipher and one to three behind on the cells. Half known (C headers): `neg_prob` 5 to 7 behind, `deft` 0.3 to 1.3,
  `cayley` nearly one above.
- One symbol dominates the targets: `deft` collapses, because alpha takes imbalance for knowledge. A ramp or a cap on
  alpha, or some steps of cross-entropy first, repairs it; `cayley` and `eaft` do not need it.
- All that sharpen pay for it in calibration: their -log p is worse, and a temperature afterwards gives part of it back.

Written by `python benchmarks/regimes/evidence.py` from the records under `benchmarks/results/regimes`. To repeat it:

    python -m pip install -c constraints.txt -e ".[regimes]"
    python benchmarks/regimes/run.py OUT
    python benchmarks/regimes/evidence.py --records OUT --out OUT

It took {minutes} minutes of a core, beside other work ({device}; torch {torch}; commit {commit}). The second run, below,
took an hour and a quarter on two cores, with other work beside it for half of the time. After a kill it goes on. `--quick` takes six minutes: four objectives, two seeds, half the steps; there deft is above cross-entropy on the cipher, else the directions are these. `--scale 4` is for a GPU.

One byte-level transformer ([the example's](start.md)) is pre-trained with cross-entropy on the standard library's
top-level modules and fine-tuned from there:

| data | what it is | steps, batch |
| --- | --- | --- |
| strong-0, -10, -30 | packages of the standard library that it has not seen; 0, 10 and 30 % of the training labels are random bytes | 600, 8 windows of 128 |
| intermediate | C headers of the interpreter: the signs are known, the words are not. FIGlet art was the other candidate, and is no one regime: its blanks look familiar and its ink does not | the same |
| cipher (weak) | the packages with their printable bytes permuted: every byte is known, and none comes where it is expected | the same |
| cells (weak) | FIGlet art of 60 words in 5 fonts, one byte for each row of a glyph; tested on other words | 300, 16 words |
| ascii | the same art as characters, most of them blanks; tested on other words, and in fonts never trained on | 500, 8 words |
| mixed | strong-30 and cells in one batch, about as many labels of each; each is tested alone | 400 |

All train by AdamW with OneCycle (5 % of warm-up) and gradients clipped at 1. `dft` has `neg_prob`'s gradient
exactly, so it has no runs of its own. A seed decides the order of the batches and which labels are wrong, alike for all
objectives, so differences are taken seed by seed. ± is one standard deviation over seeds.
"""

DIFFERENCES = """\
Each small mark is a seed, each large one their mean. The left half is drawn to a scale on which a point can be seen.

In the mixed runs one rate serves both kinds, and the weak kind asks for so high a one that the strong kind loses eight
points against strong-30 alone. `neg_prob`, `deft-order-1`, `cayley` and `eaft` keep 1 to 3.5 points more of it than cross-entropy,
and `cayley` is above cross-entropy on both kinds.
"""

CLAIMS = """\
A claim agrees where it holds in every seed, disagrees where it holds in none. What the paper says of its three
regimes, held to the tasks that stand for them here:
"""

DOMINATED = """\
FIGlet as characters is blanks, mostly. The model is soon sure of the blank everywhere, so alpha rises at every position,
and the gate of an ink label, p^alpha with a small p, goes to nothing: what would teach the model better is shut out. alpha
says how peaked the prediction is, and cannot say whether that is knowledge or the commonest symbol. `neg_prob`, whose
gate is p whatever alpha is, has it worse; `eaft`, whose gate is the entropy, has the opposite. `cayley`'s alpha follows
the label's own p, so where p is small alpha is near its floor, half the batch's mean p. The three
remedies leave deft's formula as it is: `deft-nll-first` takes cross-entropy for the first fifth of the steps, `deft-ramp` multiplies alpha by a factor from 0 to 1 over the first half,
`deft-cap` keeps alpha at 0.5 or below. Each is a line with `objectives.tsallis(alpha)` and a tensor
([recipes](recipes.md#domains-that-train-with-different-gates)). Of a font that was never trained on no objective writes a
line.
"""

TRAINING = """\
Under deft alpha and p rise together: the model commits itself. Under cross-entropy with wrong labels alpha falls: it
learns to be unsure. p on strong-30 is of the training labels, of which 30 % are random, so none can come near 1.
"""

LEARNED = """\
Solid bars are labels that became more probable, hatched ones those that became less so, by how sure the model was
before; the line is the sum. On strong-30 cross-entropy takes probability from what the model was sure of, on the right of
the panel: of all labels 10 % fall below p = 0.5 that were above it, and 1 % do under deft.
"""

HISTOGRAMS = """\
Held-out labels by their probability, before and after. An objective that sharpens moves labels from the middle to both
ends.
"""

FORGOTTEN = """\
Known domain: cross-entropy, `eaft` and, with wrong labels, `cayley` forget least. What sharpens is charged for its
certainty here as it is below, so a rise of -log p is not only forgetting.
"""

CALIBRATION = """\
Cross-entropy and `eaft` have the best -log p wherever labels are right. The gates that sharpen lose there, the more so
the larger the gate's exponent, and a single temperature fitted afterwards gives back a part. On strong-30
cross-entropy errs to the other side: it is less sure than it is right, and after a temperature it is level again.
"""

MASS = """\
The gradient of each objective on held-out labels before the first step. Bottom left is conflict: the model is sure and the
label contradicts it. deft takes the mass away from there and leaves it at the unsure tokens above; `neg_prob` takes both
away, and what the model knows already gets most. In the weak task (cipher) deft begins where cross-entropy does.
"""

RATES = """\
Does the best rate move with the mean gate? Users of DFT ask that: a gate of .5 halves the gradient, so should the rate be
doubled? Over all pairs of objectives in a task, Kendall's tau between mean gate and best rate is {top1:+.2f} by top-1 and
{nll:+.2f} by loss, where -1 would be "the smaller the gate, the higher the rate". Under AdamW, which divides the scale
of the gradient out, there is no such rule here. What moves the best rate is the data: 3e-3 to 6e-3 where the domain is
known, 1.2e-2 to 2.4e-2 where it is not, for most objectives alike; only `neg_prob` wants less. So take your rate for
cross-entropy as the first guess and try half and twice it. By loss the sharpening objectives want less than
cross-entropy where the domain is known, as every step sharpens further.
"""

SGD = """\
SGD with momentum does not divide the scale out, and its gradients were not clipped here (strong-0, one seed, validation): tau is
{top1:+.2f} by top-1 and {nll:+.2f} by loss. Four of five objectives want the same rate by top-1.
"""

AGAIN = """\
## Again from nothing, with other seeds

`run.py OUT --seed {seed}{tasks}`: another pre-training, other batches, other wrong labels, rates chosen anew. {cells} runs, {minutes}
minutes of a core{wall} ({device}). Points of top-1 from nll in the first run and in the second; bold where the two means are
further apart than two standard deviations of one seed's difference between the runs:

{table}
{within} of {number} lie within. Above nll in every seed of one run and below in every seed of the other: {turned}.
{verdicts}
Of those that do not, five had another rate in the second run, chosen by one validation seed: `cayley` on strong-0;
on the C headers deft (1.2e-2, then 6e-3, which is the better one on the test) and `tsallis-0.5`; in the mixed runs
`tsallis-0.5` (2.4e-2, then 1.2e-2) and `deft-order-1` (the other way round), where what one kind of data gains by a rate
the other loses. At the same rate as before `neg_prob` falls further behind on the C headers, `deft-order-1` collapses on
ascii by 13 points instead of 7, and falls behind on fonts never trained on, where no objective writes a line in either
run. So ± of one run leaves out what the
choice of the rate and another pre-training add: read no difference of less than a point, nor of less than three in the
mixed runs.
"""

LIMITS = """\
## What this is not

One small model, bytes, a few minutes of training, three to five seeds in each of two runs with a pre-training each. The absolute scores
mean nothing, and a difference of a tenth of a point does not either. The paper's own data and models are ready to run
([the paper's own setting](paper.md)) and have not been run.
"""
