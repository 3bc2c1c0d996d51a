"""BERT classifier that starts at its last block, whose inputs are computed once for all trainings.

Shape suffixes: B = examples, L = tokens, E = width, H = heads, D = width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


class LastBlock(BertForSequenceClassification):
    """BertForSequenceClassification of the same weights, given what its last block is given.

    The classifier reads the first token only, so the others need no outputs of the last block, and two products with
    all tokens are exchanged for products with the first token's query and with H means:

        q·(W x + b) = (Wᵀq)·x + q·b, whose last term softmax cancels        Σ p (V x + b) = V (Σ p x) + b

    They hold for every weight, but W is read from the module, so the key must not have an adapter.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Return the logits, and the mean loss if there are labels.

        Args:
            inputs_embeds: [B, L, E], the outputs of the last block but one.
            attention_mask: [B, L], 0 for padding.
            labels: [B].
        """
        bert: Any = self.bert
        block = bert.encoder.layer[-1]
        attention = block.attention.self
        x_BLE = inputs_embeds.float()
        first_B1E = x_BLE[:, :1]
        b, h, e = len(x_BLE), attention.num_attention_heads, x_BLE.shape[-1]
        q_BHD = attention.query(first_B1E).view(b, h, -1)
        asked_BHE = torch.einsum("bhd,hde->bhe", q_BHD, attention.key.weight.view(h, -1, e))
        scores_BHL = asked_BHE @ x_BLE.transpose(1, 2) / q_BHD.shape[-1] ** 0.5
        p_BHL = scores_BHL.masked_fill(attention_mask[:, None] == 0, -torch.inf).softmax(dim=-1)
        v_BHHD = attention.value(p_BHL @ x_BLE).view(b, h, h, -1)
        mean_B1E = v_BHHD.diagonal(dim1=1, dim2=2).transpose(1, 2).reshape(b, 1, e)
        out_B1E = block.feed_forward_chunk(block.attention.output(mean_B1E, first_B1E))
        logits = self.classifier(self.dropout(bert.pooler(out_B1E)))
        loss: Any = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
