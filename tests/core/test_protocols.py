from concurrent.futures import Future, ThreadPoolExecutor

from archsmith.core.protocols import Executor, Logger, Store


def square_elsewhere(executor: Executor, value: int) -> Future[int]:
    return executor.submit(pow, value, 2)


def test_a_standard_executor_is_an_executor() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert isinstance(pool, Executor)
        assert square_elsewhere(pool, 3).result() == 9


def test_a_dict_is_a_store_and_a_list_is_not() -> None:
    store: Store = {}
    store["a"] = b"x"
    assert isinstance(store, Store)
    assert "a" in store
    assert store["a"] == b"x"
    assert not isinstance(frozenset(), Store)


def test_a_logger_needs_both_halves() -> None:
    class Writer:
        def record(self, kind: str, **fields: object) -> None: ...

    assert not isinstance(Writer(), Logger)
