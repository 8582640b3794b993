from internlm_lib.journal import Journal
from internlm_lib.run_folder import RunFolder
from internlm_lib.tracking.replica_state import (
    RUN_JOURNAL,
    Mirror,
    ReplicaState,
    load_state,
    state_path,
)


def test_state_is_read_back_equal(tmp_path):
    folder = RunFolder.of("r", tmp_path)
    Journal(folder.journal).write("tags", stage="04_compare", values={})
    state = ReplicaState("sqlite:///x.db", parent=Mirror("id", last_time=1.5))
    list(state.new_events(folder, RUN_JOURNAL))
    state.save(folder)
    assert load_state(folder, "sqlite:///x.db") == state
    assert state.cursors[RUN_JOURNAL].born > 0


def test_another_store_or_a_damaged_file_starts_from_nothing(tmp_path):
    folder = RunFolder.of("r", tmp_path)
    ReplicaState("sqlite:///x.db", parent=Mirror("id", last_time=1.5)).save(folder)
    assert load_state(folder, "http://elsewhere") == ReplicaState("http://elsewhere")
    state_path(folder).write_text('{"store": ')
    assert load_state(folder, "sqlite:///x.db").parent is None


def test_only_unsent_events_are_given(tmp_path):
    folder = RunFolder.of("r", tmp_path)
    journal = Journal(folder.journal)
    state = ReplicaState("s")
    assert not state.has_new_events(folder)
    journal.write("metrics", stage="s", values={}, step=1)
    ((_, offset),) = state.new_events(folder, RUN_JOURNAL)
    state.cursors[RUN_JOURNAL].offset = offset
    assert not state.has_new_events(folder)
    journal.write("metrics", stage="s", values={}, step=2)
    assert [event["step"] for event, _ in state.new_events(folder, RUN_JOURNAL)] == [2]


def test_a_journal_that_was_deleted_and_begun_again_is_read_from_its_start(tmp_path):
    folder = RunFolder.of("r", tmp_path)
    state = ReplicaState("s")
    Journal(folder.journal).write("metrics", stage="s", values={}, step=1)
    ((_, offset),) = state.new_events(folder, RUN_JOURNAL)
    state.cursors[RUN_JOURNAL].offset = offset
    folder.journal.unlink()
    for step in (7, 8, 9):
        Journal(folder.journal).write("metrics", stage="s", values={}, step=step)
    assert [e["step"] for e, _ in state.new_events(folder, RUN_JOURNAL)] == [7, 8, 9]
