"""A training's way through the files, from `dvc repro train_classifier@poolformer_s12-0` to its weights.

dvc.yaml                                the stage: command, what it depends on, what it writes
__main__.py                             the command line
config.py                               params.yaml, checked
catalogue.py                            the tasks; tasks/classification/description.py is the classifier's
stages/train.py                         what the stage does
launch/works.py                         the training as a call with arguments; launch/fingerprint.py: its identity
launch/jobs.py, launch/submission.py    the job: attached to or submitted, waited for, retried
launch/worker.py                        what runs inside a job, one process per rank
tasks/classification/training.py        the recipe: data, model, optimiser, loss
train/loop.py, train/adapt.py           optimiser steps, checkpoints, resume; what is done to the model before step 0
data/loaders.py                         batches from the .beton
models/poolformer.py                    the model
tracking/follow.py                      MLflow and the last line of the log, meanwhile
"""
