"""Make generation configurations valid, so that transformers writes them."""

from __future__ import annotations

from transformers import GenerationConfig

from lightning_mlc.errors import UserError, first_line

_INERT = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty")


def make_writable(generation: GenerationConfig) -> None:
    """Remove entries that have no effect, because transformers refuses to write them.

    For example, some published models have a temperature together with ``do_sample: false``.

    Args:
        generation: The configuration, which is changed in place.

    Raises:
        UserError: It is invalid for another reason.
    """
    if _is_writable(generation):
        return
    if not generation.do_sample:
        for name in _INERT:
            setattr(generation, name, None)
    if (generation.num_beams or 1) == 1:
        for name in _OF_BEAMS:
            setattr(generation, name, None)
    if generation.pad_token_id is not None and generation.pad_token_id < 0:
        generation.pad_token_id = None
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise UserError(
            "ckpt_path",
            f"the model's generation configuration cannot be written ({first_line(error)}); correct it in the folder "
            "of the model that the training started from, and train again",
        ) from error


def _is_writable(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True
