"""Which models a plain text says enough to, checked before it is run through them for hours."""

from torch import Tensor, nn

from arc_ao.inference import evaluation_mode, run_model
from arc_ao.summary import arc_tensors

TRIED_TOKENS = 8
WINDOW = 512  # calibration tokens that a model sees at a time, at most


def calibration_window(model: nn.Module) -> int:
    """WINDOW, or as many tokens as the model, or its text part, has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(WINDOW, positions or WINDOW)


def require_causal(model: nn.Module) -> None:
    """Refuse models that do not predict the next token from those before it.

    Raises:
        ValueError: an encoder, or an encoder-decoder, of transformers.
    """
    found = _other_than_causal(model)
    if not found:
        return
    raise ValueError(
        f"{type(model).__name__}: expected a causal language model, found {found}: its perplexity "
        "on a plain text would mean nothing"
    )


def is_causal_language_model(model: nn.Module) -> bool:
    """Whether a model of transformers predicts the next token from those before it, and has a head
    to do so."""
    return not _other_than_causal(model) and getattr(model, "can_generate", bool)()


def _other_than_causal(model: nn.Module) -> str:
    """What a model of transformers is that sees later tokens too; "" for all others."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    masked = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        return "an encoder, which sees the tokens after each one, too"
    return ""


def require_text_input(model: nn.Module, batches: list[Tensor]) -> None:
    """Refuse models that do not run on token ids alone, and ids that are not theirs.

    Args:
        batches: input ids [B, T]; a few tokens of the first one are tried.

    Raises:
        ValueError: saying which it is.
    """
    name, config = type(model).__name__, model.config
    python = "in Python arc_ao.quantize_ takes any inputs of a model as calibration_data"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name}: expected a model that runs on a plain text, found an encoder-decoder, whose "
            f"decoder takes another one; {python}"
        )
    known = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(int(batch.max()) for batch in batches)
    if known is not None and largest >= known:
        raise ValueError(
            f"{name}: expected token ids below the model's vocabulary of {known:,}, found "
            f"{largest:,}; the tokenizer beside the model is not its own"
        )
    if arc_tensors(model):
        return  # it has run before
    try:
        with evaluation_mode(model):
            run_model(model, batches[0][:, :TRIED_TOKENS])
    except Exception as error:  # whatever a forward of another library raises
        raise ValueError(
            f"{name}: expected a model that runs on token ids alone, its forward raised "
            f"{type(error).__name__} ({' '.join(str(error).split())}); {python}"
        ) from error
