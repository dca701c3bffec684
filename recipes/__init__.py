"""Training recipes: the commands `zoo-train`, `zoo-eval`, `zoo-predict` and `zoo-report`, and what they share.

train, eval, predict, report         the commands
cli, sweep, early, errors            their command lines, sweeps, first checks and errors
config, conf/, composition           the schema, the settings, and what a run starts from
tasks, classify/, dense/             the tasks: dense/ is detection and segmentation
base_run, distributed, timing,       what every training shares
  seeding, progress, batchnorm
run_folder, run_checkpoints,         the folder of a run: who may write to it, and its files
  run_weights, reading, records,
  lock, logs, atomic_files
images, inputs, files, corrupt       reading of images and texts, and what can't be read
digits, scenes, subsets              the data of the demos, and parts of any data
plots, sheet                         pictures
"""

from zoo.extras import require_for_commands

require_for_commands(__name__)
