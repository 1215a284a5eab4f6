"""What every trainer does with its `args`."""

from typing import Any

from accelerate.utils import is_compiled_module
from transformers.trainer_utils import SaveStrategy

from ._cache import check_writable
from ._trl import get_config_model_id


def resolve_args(args: Any | None, config_class: type, model: Any, trainer_class: type) -> Any:
    """
    The configuration of a trainer.

    Args:
        args (`TrainingArguments`, *optional*):
            What the user has passed. If `None`, the defaults, with an output directory named after the model.
        config_class (`type`):
            Class that the trainer takes.
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model, or its name.
        trainer_class (`type`):
            The trainer, whose `_name` TRL puts into model cards.

    Returns:
        `TrainingArguments`: The configuration, of class `config_class`.

    Raises:
        `TypeError`: If `args` is of another class.
        `ValueError`: If the model is wrapped by `torch.compile`. Its weights would be saved under names that nothing
            loads, and TRL would load the reference from the model's name.
        `OSError`: If there are to be checkpoints, and nothing can be written to the output directory.
    """
    if args is None:
        model_name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config_class(f"{model_name.split('/')[-1] or 'model'}-{trainer_class._name}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"`args` is of type {type(args).__name__}. {trainer_class.__name__} expects {config_class.__name__}: "
            "replacing the class name is enough for all arguments that mean something to both."
        )
    if is_compiled_module(model):
        raise ValueError(
            f"`model` is a {type(model).__name__} made by `torch.compile`, whose weights would be saved under names "
            "that `from_pretrained` does not find. Pass the model itself, and set `torch_compile=True`."
        )
    if args.should_save and args.save_strategy != SaveStrategy.NO:
        check_writable(args.output_dir)
    return args
