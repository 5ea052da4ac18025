"""The rules of consume → score → adapt → produce → commit, and for each the tests that fail without it."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One rule; `tests` are paths below `tests/` with a test's name, which ends every parameter."""

    text: str
    tests: tuple[str, ...]


_SCRIPTS = "crash/test_scripts.py::test_any_script_is_survived_however_batches_are_cut"
_RESTORE = "broker/test_restore.py::test_"
_WITHOUT = "crash/test_without_rules.py::test_without_a_rule_a_script_ends_badly"

RULES = (
    Rule(
        "Offsets are the loop's own: no auto commit, no auto store, `read_committed`, no silent reset, CRCs checked; "
        "each group protocol gets its own settings.",
        (
            "unit/test_properties.py::test_offsets_are_the_loops_own_and_nothing_is_skipped",
            "unit/test_config.py::test_properties_that_the_loop_owns_are_refused_with_the_reason",
            "broker/test_loop.py::test_every_event_has_one_score",
            "broker/test_loop.py::test_aborted_upstream_transactions_are_not_scored_and_open_ones_are_waited_for",
        ),
    ),
    Rule(
        "One transactional producer per process, its id stable per instance: a restart ends its own dangling "
        "transaction.",
        (
            "unit/test_properties.py::test_the_transactional_id_is_the_instances_and_stays_the_same",
            "broker/test_faults.py::test_kill_9",
        ),
    ),
    Rule(
        "The fence is the member's generation, asked for at every commit; −1 never commits.",
        (_WITHOUT, "unit/test_commit.py::test_without_a_generation_nothing_is_committed"),
    ),
    Rule(
        "Next offsets are the loop's own map: last processed + 1, never `position()`.",
        ("unit/test_consumer.py::test_a_batch_knows_where_the_next_one_begins", _SCRIPTS),
    ),
    Rule(
        "Changes are the state only after the commit returned; an abort puts rows and positions back.",
        (_WITHOUT, "unit/test_runner.py::test_an_aborted_batch_is_done_again_and_ends_as_if_nothing_had_happened"),
    ),
    Rule(
        "Retriable: again. Abortable: abort, rewind. Fatal or unflagged: new producer, and look whether it had "
        "committed. Fenced twice: exit 4.",
        (
            _WITHOUT,
            "crash/test_without_rules.py::test_a_member_that_is_fenced_twice_steps_back",
            "unit/test_kafka_errors.py::test_every_error_with_every_flags_has_its_consequence",
            "unit/test_commit.py::test_an_abort_that_fails_ends_with_a_new_producer_and_a_look",
            "broker/test_loop.py::test_two_instances_with_one_transactional_id_one_survives",
        ),
    ),
    Rule(
        "A fatal error that surfaces as `SystemError` is the `KafkaException` that caused it.",
        ("unit/test_kafka_errors.py::test_the_error_inside_a_system_error_is_found",),
    ),
    Rule(
        "After a commit that may have been sent twice, the next transaction begins on a new producer.",
        (
            _WITHOUT,
            "broker/test_connection_faults.py::test_a_late_end_of_a_transaction_does_not_meet_the_next_one",
            "unit/test_coordinator_watch.py::test_a_request_of_the_coordinator_left_without_an_answer_moves_it",
            "broker/test_output_producer.py::test_after_a_cut_connection_the_next_transaction_wants_a_new_producer",
        ),
    ),
    Rule(
        "An output that the broker refuses for good is found by its source and dead-lettered, without payload if that "
        "is what does not fit.",
        (
            "crash/test_without_rules.py::test_an_output_that_is_too_large_becomes_a_dead_letter_and_the_stream_goes_on",
            "broker/test_loop.py::test_an_output_that_the_broker_refuses_for_good_becomes_a_dead_letter",
        ),
    ),
    Rule(
        "Partitions that are taken away take their rows along, and nothing of theirs is committed afterwards; those "
        "that come are read once their rows are there, from the committed offset. A restore ends where the next "
        "rebalance takes its partition away.",
        (
            _WITHOUT,
            "unit/test_runner.py::test_shards_say_where_they_stand",
            "unit/test_restorer.py::test_a_cancelled_restore_is_forgotten",
            "broker/test_loop.py::test_members_join_and_leave_in_the_middle",
            "broker/test_faults.py::test_members_join_and_leave_in_a_loop",
            "broker/test_faults.py::test_a_member_that_is_removed_during_a_long_batch_commits_nothing_of_it",
            f"{_RESTORE}state_moves_with_its_partition_when_members_join_and_leave",
            f"{_RESTORE}a_rebalance_during_a_restore_cancels_it_and_every_event_has_one_score",
        ),
    ),
    Rule(
        "A new owner waits for what its predecessor left under way: first the committed offset, then the log's end "
        "with all that is not committed, then everything up to there. It says how far it is, and gives up when it "
        "stands still. Rows that are not as of the committed offset are refused with exit 5.",
        (
            _WITHOUT,
            "broker/test_faults.py::test_an_output_under_way_when_its_member_was_killed_comes_too_late",
            f"{_RESTORE}a_restore_waits_for_a_transaction_that_is_open_in_the_changelog",
            f"{_RESTORE}a_restore_that_does_not_advance_is_given_up_and_says_how_far_it_got",
            f"{_RESTORE}a_changelog_that_ends_in_aborted_records_and_markers_is_restored",
            f"{_RESTORE}a_run_with_rows_and_offsets_apart_exits_with_5",
            "unit/test_restorer.py::test_rows_that_do_not_belong_to_the_offsets_are_refused_with_remedies",
        ),
    ),
    Rule(
        "A committed offset before the start of the log, another number of partitions and a topic that was made anew "
        "are refused, with what to do.",
        (
            "broker/test_faults.py::test_a_committed_offset_that_retention_has_passed_is_refused",
            "broker/test_faults.py::test_partitions_that_were_added_are_refused",
            f"{_RESTORE}a_committed_offset_before_the_log_start_is_refused",
            f"{_RESTORE}a_changelog_of_another_form_is_refused",
            f"{_RESTORE}an_input_topic_that_was_made_anew_is_refused",
        ),
    ),
    Rule(
        "SIGTERM finishes the batch, commits and leaves the group; the second one stops at once.",
        (
            "broker/test_loop.py::test_sigterm_finishes_the_batch_leaves_the_group_and_a_restart_goes_on",
            "broker/test_faults.py::test_sigterm_during_a_commit_finishes_it",
            "broker/test_faults.py::test_a_second_sigterm_during_a_commit_stops_at_once",
        ),
    ),
)
