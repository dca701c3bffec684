"""Training recipes: the commands `zoo-train`, `-eval`, `-predict`, `-embed` and `-report`, and what they share.

commands/, report                    the commands
train, eval, predict                 `python -m zoo.recipes.train`, also under torchrun
cli, sweep, early, errors            their command lines, sweeps, first checks and errors
config, conf/, composition           the schema, the settings, and the starting point of a run
tasks, classify/, dense/             the tasks: dense/ is detection and segmentation
base_run, distributed, timing,       shared by the training of all tasks
  seeding, progress, batchnorm
run_folder, run_checkpoints,         the run folder: its lock and its files
  run_weights, reading, records,
  lock, logs, atomic_files
images, inputs, files, corrupt       reading images and text files, and handling corrupt ones
digits, scenes, subsets              the data of the demos, and subsets of any data
features, embeddings, npy_rows,      features of frozen models, their files, and the cache
  cache
plots, sheet                         pictures
"""

from zoo.extras import require_for_commands

require_for_commands(__name__)
