"""Where the faults are shown that are neither values (`_faults.py`) nor wrong arguments (`_mistakes.py`)."""

from __future__ import annotations

HERE = "tests/reliability/"
OPTIONS = "tests/test_options.py::"
ELSEWHERE: dict[int, tuple[str, str, str]] = {  # number: what, outcome, test
    5: ("initial parameters are NaN", "error", "tests/test_checks.py::test_parameters_that_cannot_be_trained"),
    11: (
        "Jacobian that is not symmetric, given to CG",
        "error",
        HERE + "test_mistakes.py::test_conjugate_gradients_on_a_jacobian_that_is_not_symmetric_are_refused",
    ),
    18: (
        "learning rate under implicit differentiation",
        "error",
        HERE + "test_mistakes.py::test_a_learning_rate_is_refused_where_it_has_no_effect_and_taken_where_it_has",
    ),
    23: (
        "dead ReLU and Adam",
        "right",
        "tests/solvers/test_unrolled.py::test_a_coordinate_whose_gradient_is_always_zero_gives_no_nan",
    ),
    24: (
        "clipping at norm zero",
        "right",
        "tests/_jaxpr/test_differentiable.py::test_the_hypergradient_is_finite_where_optax_alone_gives_nan",
    ),
    25: (
        "another dropout mask at each call",
        "`hg.check` says stochastic",
        "tests/diagnostics/test_check.py::test_stochastic_is_named_and_the_draw_compared",
    ),
    27: (
        "minibatch smaller than the parameters",
        "warning",
        HERE + "test_mistakes.py::test_a_minibatch_smaller_than_the_parameters_is_a_warning",
    ),
    30: ("None leaf", "right", HERE + "test_mistakes.py::test_python_numbers_and_none_are_hyperparameters"),
    32: ("Python numbers", "right", HERE + "test_mistakes.py::test_python_numbers_and_none_are_hyperparameters"),
    34: ("mixed precision", "each leaf keeps its own", HERE + "test_mistakes.py::test_each_leaf_keeps_its_precision"),
    35: (
        "a step that returns other parameters",
        "error",
        HERE + "test_mistakes.py::test_a_map_that_returns_other_parameters_is_named",
    ),
    40: ("label = number of classes", "error", HERE + "test_mistakes.py::test_a_label_outside_its_classes_is_named"),
    41: ("label = -1", "error", HERE + "test_mistakes.py::test_a_label_outside_its_classes_is_named"),
    42: (
        "features and labels of different lengths",
        "error",
        HERE + "test_mistakes.py::test_features_and_labels_of_different_lengths_are_named",
    ),
    43: (
        "NaN in the data",
        "warning",
        "tests/_jaxpr/test_labels.py::test_nan_in_the_data_is_a_warning_with_path_count_and_row",
    ),
    44: ("a start outside the domain", "error", HERE + "test_mistakes.py::test_a_start_outside_the_domain_is_named"),
    45: ("a huge step at a boundary", "stays inside", "tests/domains/test_domain.py::test_no_step_leaves_the_domain"),
    46: (
        "dropout or momentum towards 1",
        "stays inside, comes back",
        "tests/domains/test_domain.py::test_the_ends_belong_to_the_domain_and_can_be_left",
    ),
    47: (
        "negative tolerance or steps",
        "error",
        OPTIONS + "test_a_number_out_of_range_is_refused_with_the_bound",
    ),
    48: ("unknown option", "error", OPTIONS + "test_a_misspelt_option_is_refused_with_the_nearest_known"),
    49: (
        "donated state used again",
        "error",
        HERE + "test_mistakes.py::test_a_state_that_was_given_away_cannot_be_used_again",
    ),
    50: (
        "another shape in the middle of a run",
        "error",
        HERE + "test_mistakes.py::test_a_batch_of_another_shape_in_the_middle_of_a_run_is_named",
    ),
    51: (
        "x64 toggled between save and load",
        "error",
        HERE + "test_resume.py::test_x64_toggled_between_save_and_load_is_refused",
    ),
    52: (
        "a callback raises",
        "its own type, with the result",
        "tests/outer/test_tune.py::test_an_exception_of_a_callback_keeps_its_type_and_brings_the_result",
    ),
    53: (
        "Ctrl-C",
        "the best so far",
        "tests/outer/test_signals.py::test_ctrl_c_at_any_instant_returns_a_consistent_result",
    ),
    54: (
        "SIGTERM",
        "the best so far, saved",
        HERE + "test_signals.py::test_sigterm_ends_the_run_within_a_step_and_all_of_it_is_saved",
    ),
    55: ("SIGKILL", "goes on to the bit", HERE + "test_signals.py::test_real_kills_and_real_signals_lose_nothing"),
    56: ("disk full", "warning, goes on", HERE + "test_resume.py::test_a_full_disk_is_a_warning_and_the_run_goes_on"),
    57: (
        "folder that cannot be written",
        "error before anything compiles",
        HERE + "test_resume.py::test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_compiled",
    ),
    58: (
        "a flipped bit",
        "named; the checkpoint before it",
        "tests/checkpoints/test_checkpoint.py::test_damage_is_named_and_the_checkpoint_before_it_is_used",
    ),
    59: ("two writers", "error", HERE + "test_resume.py::test_two_runs_in_one_folder_are_refused"),
    60: (
        "another number of devices",
        "right",
        "tests/test_contract.py::test_sharded_data_give_the_unsharded_result_and_a_stable_state",
    ),
}


def rows() -> list[str]:
    """A table in Markdown."""
    head = ["| | fault | outcome | shown by |", "|---|---|---|---|"]
    return head + [f"| {n} | {what} | {outcome} | `{test}` |" for n, (what, outcome, test) in ELSEWHERE.items()]
