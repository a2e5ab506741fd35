"""Contract suites: what every space (method, family, task, ...) must keep, shipped so that outsiders can inherit them.

A suite is a class of pytest tests with a fixture to override. It may import anything; nothing imports it.

Example:
    >>> class TestMySpace(SpaceContract):  # in a test file
    ...     @pytest.fixture
    ...     def space(self):
    ...         return my_space()
"""
