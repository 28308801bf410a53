"""The laws of the model by name. A copy of the package with a planted bug can be put to them too, for each takes the package.

Laws between two computations are stated in float64, where correct computations agree to some 1e-14.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import model_layer_laws as layers
import model_sequence_laws as sequences
import model_weight_laws as weights

if TYPE_CHECKING:
    from collections.abc import Callable

LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        layers.matches_reference,
        layers.matches_reference_with_grouped_values,
        layers.chooses_the_experts_of_the_reference,
        sequences.prefill_then_decode_is_the_whole,
        sequences.prefill_in_chunks_is_prefill,
        sequences.one_token_of_one_sequence_decodes,
        sequences.packed_sequences_are_separate_sequences,
        sequences.rows_of_a_batch_are_independent,
        sequences.later_tokens_change_nothing_before_them,
        sequences.decode_rows_do_not_see_each_other,
        weights.layer_kinds_follow_the_released_lists,
        sequences.full_attention_knows_no_positions,
        layers.routing_weighs_by_scores_and_chooses_by_bias,
        layers.experts_compute_alike_one_by_one_gathered_and_grouped,
        layers.biases_move_towards_an_even_load,
        weights.recomputation_changes_no_gradient,
        weights.loss_ignores_places_without_target,
        weights.checkpoints_come_back_bit_for_bit,
        weights.released_names_are_stored,
        weights.gates_start_as_the_report_has_them,
        layers.one_decay_per_head_is_the_same_decay_in_every_channel,
        layers.decay_without_the_delta_rule_erases_nothing,
        layers.switches_change_what_they_name,
        layers.operators_are_exchangeable,
        sequences.forks_and_marks_keep_what_they_had,
        sequences.decode_steps_depend_on_the_device_alone,
        sequences.failed_calls_leave_the_cache_as_it_was,
        sequences.generated_tokens_are_those_of_the_whole_model,
        sequences.drawn_tokens_do_not_depend_on_neighbours,
        sequences.draws_follow_the_probabilities_of_the_nucleus,
    )
}
