"""The longer schedules of Table 7, described: the classifier PoolFormer-S12 with other epochs."""

from dataclasses import replace

from pipeline.tasks.classification.description import CLASSIFIER, evaluation_arguments, forward_gmacs, validation

BASE = "poolformer_s12"
LONGER = replace(
    CLASSIFIER,
    name="longer",
    section="longer_training",
    names=lambda params: tuple(params.longer_training.variants),
    base=BASE,
    model_arguments=lambda name: {"variant": BASE},
    evaluation_section=CLASSIFIER.section,
    paper_recipe=CLASSIFIER.section,
    released_stage="",
    released_names=lambda params: [],
    evaluation_arguments=lambda params, name: evaluation_arguments(params, BASE),
    forward_gmacs=lambda name, image_px: forward_gmacs(BASE, image_px),
    evaluation_gmacs=lambda params, name: CLASSIFIER.evaluation_gmacs(params, BASE),
    parameters=lambda params, name: CLASSIFIER.parameters(params, BASE),
    fine_tune="",
    takes_released=lambda params: False,
    watching=lambda params, name: validation(params, BASE),
    has_test_sets=False,
    training_outputs={"validation.csv": "results/train_longer/{name}.validation.csv"},
    evaluation_outputs={"predictions.parquet": "predictions/evaluate_longer/{name}.parquet"},
)
