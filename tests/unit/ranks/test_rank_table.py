"""Rank tables: what is read of each template, and that a damaged one is told from a whole."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from internlm_lib.errors import InputError
from internlm_lib.ranks.rank_table import RankTable, read_rank_table
from tests.unit.ranks.conftest import TableWriter, template_1, template_2

A3 = template_1(2, 16, version="1.2") | {
    "super_pod_list": [
        {"super_pod_id": "0", "server_list": [{"server_id": "node-0"}]},
        {"super_pod_id": "1", "server_list": [{"server_id": "node-1"}]},
    ]
}


def test_template_1_places_its_servers_by_rank(write_table: TableWriter) -> None:
    values = template_1()
    values["server_list"].reverse()  # the order in the file means nothing
    values["server_list"][0]["device"].reverse()
    table = read_rank_table(write_table(values))
    assert [server.server_id for server in table.servers] == [f"node-{i}" for i in range(4)]
    assert {server.devices for server in table.servers} == {tuple(range(8))}
    assert table.servers[2].address == "192.168.0.3" and table.ranks_per_server == 8


def test_an_address_is_the_pods_or_the_hosts_or_what_the_server_is_called(
    write_table: TableWriter,
) -> None:
    values = template_1(3, 1)
    del values["server_list"][1]["container_ip"]
    del values["server_list"][2]["container_ip"], values["server_list"][2]["host_ip"]
    table = read_rank_table(write_table(values))
    assert [s.address for s in table.servers] == ["192.168.0.1", "10.0.0.2", "node-2"]


def test_a3_has_super_pods_and_more_devices(write_table: TableWriter) -> None:
    assert read_rank_table(write_table(A3)).ranks_per_server == 16
    lost = deepcopy(A3)
    lost["super_pod_list"].pop()
    with pytest.raises(InputError, match="super_pod_list names node-0, server_list node-0, node-1"):
        read_rank_table(write_table(lost))


def test_the_older_template_has_an_instance_per_rank(write_table: TableWriter) -> None:
    table = read_rank_table(write_table(template_2(2, 4)))
    assert [server.address for server in table.servers] == ["10.0.0.1", "10.0.0.2"]
    assert table.servers[1].devices == (0, 1, 2, 3)


def test_modelarts_names_the_folder(write_table: TableWriter, tmp_path: Path) -> None:
    write_table().rename(tmp_path / "jobstart_hccl.json")
    assert read_rank_table(tmp_path).path == tmp_path / "jobstart_hccl.json"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"192.168.0.3"}, 2),
        ({"10.0.0.4", "somewhere"}, 3),
        ({"node-1"}, 1),
        ({"192.168.0.2", "10.0.0.1"}, 1),  # its own address before the host's
        ({"10.9.9.9"}, None),
        ({"10.0.0.1", "10.0.0.2"}, None),
    ],
)
def test_this_machine_is_found_by_name_or_address(
    write_table: TableWriter, names: set[str], found: int | None
) -> None:
    assert read_rank_table(write_table()).find(names) == found


def test_the_only_server_is_this_machine_whatever_it_is_called(write_table: TableWriter) -> None:
    assert read_rank_table(write_table(servers=1)).find({"10.9.9.9"}) == 0


def changed(path: tuple[Any, ...], value: Any, table: dict[str, Any] | None = None) -> Any:
    """The table with one value changed, or, if it is `...`, removed."""
    table = deepcopy(template_1() if table is None else table)
    *parents, last = path
    place: Any = table
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return table


FIRST = ("server_list", 0, "device", 0)
LAST = ("server_list", 3, "device", 7)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed(("status",), "initializing"), "status = 'initializing': it must be 'completed'"),
        (changed(("status",), ...), "status = None"),
        (changed(("version",), "2.0"), "version = '2.0': 1.0 and 1.2 can be read"),
        (changed(("version",), ...), "version = None"),
        (changed(("server_count",), "3"), "server_count = 3, but server_list holds 4 servers"),
        (changed(("server_list", 1, "server_id"), "node-0"), "server_list[1].server_id = 'node-0'"),
        (changed(("server_list", 1, "server_id"), 7), "server_list[1].server_id: "),
        (changed(("server_list", 2, "device"), []), "server_list[2].device: "),
        (changed((*FIRST, "rank_id"), ...), "server_list[0].device[0].rank_id: Field required"),
        (changed((*FIRST, "rank_id"), "first"), "server_list[0].device[0].rank_id: "),
        (changed((*FIRST, "device_id"), "-1"), "server_list[0].device[0].device_id: "),
        (changed((*LAST, "rank_id"), "30"), "server_list[3].device[7].rank_id = 30 is there twice"),
        (changed((*LAST, "rank_id"), "32"), "server_list[3].device[7].rank_id = 32 follows 30"),
        (changed(LAST, ...), "different numbers of devices"),
        (changed((*LAST, "device_id"), "6"), "server_list[3].device[7].device_id = 6 of rank 31"),
        (changed((*LAST, "device_id"), "0"), "devices of a server must ascend"),
        (changed(("group_list", 0, "instance_list", 1, "rank_id"), ..., template_2()),
         "group_list[0].instance_list[1].rank_id: Field required"),
        (changed(("group_list", 0, "instance_list", 3, "rank_id"), "1", template_2()),
         "group_list[0].instance_list[3].rank_id = 1 is there twice"),
        ({"status": "completed", "server_group_list": []}, "server_group_list: "),
        ([1], "a JSON object is expected, not list"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused_with_its_field(
    write_table: TableWriter, table: Any, message: str
) -> None:
    path = write_table(table)
    with pytest.raises(InputError) as refusal:
        read_rank_table(path)
    text = str(refusal.value)
    assert text.startswith(f"RANK_TABLE_FILE={path}: ") and message in text
    assert "unset RANK_TABLE_FILE" in text


def test_ranks_that_alternate_between_servers_are_refused(write_table: TableWriter) -> None:
    values = template_1(2, 2)
    for i, server in enumerate(values["server_list"]):
        for d, device in enumerate(server["device"]):
            device["rank_id"] = str(2 * d + i)
    with pytest.raises(
        InputError, match=r"server_list\[0\].device\[1\].rank_id = 2: server node-0"
    ):
        read_rank_table(write_table(values))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"status": "comp', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (None, "No such file"),
    ],
)
def test_what_is_no_table_at_all_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "hccl.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rank_table(path)


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.text(max_size=8),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
TABLES = (template_1(2, 2), A3, template_2())


def is_sound(table: RankTable) -> bool:
    """Every server has as many devices, in ascending order."""
    sizes = {len(server.devices) for server in table.servers}
    ascending = all(list(s.devices) == sorted(set(s.devices)) for s in table.servers)
    return len(sizes) == 1 and ascending and 0 not in sizes


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=strategies.data(), table=strategies.sampled_from(TABLES))
def test_any_damage_is_refused_or_leaves_a_sound_table(
    write_table: TableWriter, data: strategies.DataObject, table: dict[str, Any]
) -> None:
    """One value anywhere becomes any other, or the text is cut or loses a piece."""
    place, path = table, []
    while (
        isinstance(place, dict | list) and place and (not path or data.draw(strategies.booleans()))
    ):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        path.append(data.draw(strategies.sampled_from(keys)))
        place = place[path[-1]]
    text = json.dumps(changed(tuple(path), data.draw(JSON), table))
    begin = data.draw(strategies.integers(0, len(text)))
    if data.draw(strategies.booleans()):
        text = text[:begin] + text[begin + data.draw(strategies.integers(0, 40)) :]
    file = write_table()
    file.write_text(text)
    try:
        assert is_sound(read_rank_table(file))
    except InputError as refusal:
        assert str(file) in str(refusal)
