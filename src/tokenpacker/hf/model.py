"""The complete model: takes images, regions and text, returns logits.

Shapes: B samples, S sequence length, K positions whose next token has a label.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.utils import can_return_tuple

from tokenpacker import projectors
from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.generation import ImageGenerationMixin
from tokenpacker.hf.outputs import ImageFeatures, TokenPackerCausalLMOutput
from tokenpacker.hf.pretrained import TokenPackerPreTrainedModel
from tokenpacker.hf.vision_encoder import cut_tower
from tokenpacker.regions import RegionEncoder
from tokenpacker.sequence import IGNORED


def _with_arguments_of(base: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a method a signature with the arguments of `base` first, which transformers and PEFT inspect."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        *arguments, others = inspect.signature(base).parameters.values()
        own = [p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]
        method.__signature__ = inspect.Signature([*arguments, *own, others])  # type: ignore[attr-defined]
        return method

    return decorate


class TokenPackerForConditionalGeneration(
    TokenPackerPreTrainedModel, ImageGenerationMixin, LlavaForConditionalGeneration
):
    """The model that answers: `TokenPackerModel` and the language model's head."""

    def __init__(self, config: TokenPackerConfig):
        TokenPackerPreTrainedModel.__init__(self, config)
        self.model = TokenPackerModel(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_parts(
        cls, vision_tower: PreTrainedModel, language_model: PreTrainedModel, **config_kwargs: Any
    ) -> TokenPackerForConditionalGeneration:
        """A model around a vision tower and a causal language model, the projector freshly initialised.

        The parts are taken over, not copied; the tower's layers above the last used level and its
        pooling head are removed.

        Args:
            config_kwargs: further arguments of `TokenPackerConfig`.

        Raises:
            ValueError: if the parts do not fit together, and for a head with a bias, which the model does not have.
        """
        head = language_model.get_output_embeddings()
        if head.bias is not None:
            raise ValueError(
                f"the head of {type(language_model).__name__} has a bias; only plain linear heads are supported"
            )
        parts = (copy.deepcopy(vision_tower.config), copy.deepcopy(language_model.config))  # not changed
        config = TokenPackerConfig(*parts, **config_kwargs)
        with torch.device("meta"):
            model = cls(config)
        model.model.vision_tower = cut_tower(vision_tower, config.num_vision_layers)
        model.model.language_model = language_model.base_model
        model.model.multi_modal_projector = projectors.build(config.projector).to(head.weight.device, head.weight.dtype)
        if config.regions is not None:
            model.model.region_encoder = RegionEncoder(config.regions).to(head.weight.device, head.weight.dtype)
        for part, own in ((vision_tower, config.vision_config), (language_model, config.text_config)):
            theirs = part.config
            for module in part.modules():
                if getattr(module, "config", None) is theirs:
                    module.config = own
        model.lm_head = head
        model.generation_config = language_model.generation_config
        return model

    def get_image_features(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> ImageFeatures:
        """Calls `TokenPackerModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, *args, **kwargs)

    @can_return_tuple
    @_with_arguments_of(TokenPackerModel.forward)
    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        only_learned: bool = False,
        **kwargs: Any,
    ) -> TokenPackerCausalLMOutput:
        """Runs `TokenPackerModel.forward` and makes logits, and a loss if `labels` (B, S) are given (-100 is ignored).

        Args:
            only_learned: make logits (K, vocabulary) only at the K positions whose next token has a label. The loss is
                the same and needs a fraction of the memory, as images and questions are most of a sequence.

        Raises:
            ValueError: for inputs that `TokenPackerModel.forward` refuses, and for `only_learned` without labels.
        """
        if labels is None and only_learned:
            raise ValueError("only_learned=True needs labels; pass them, or leave it out")
        if only_learned and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("only_learned=True already selects the positions; leave logits_to_keep out")
        outputs = self.model(*args, **kwargs | {"return_dict": True})
        states = outputs.last_hidden_state
        if labels is not None and only_learned:
            following = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # (B, S)
            learned = following != IGNORED
            states, kwargs = states[learned.to(states.device)], kwargs | {"shift_labels": following[learned]}
        else:
            states = states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        from_states = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return TokenPackerCausalLMOutput(loss=loss, logits=logits, **from_states)
