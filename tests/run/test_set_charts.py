"""The chart of a selection."""

from archsmith.run.set_charts import selection


def test_a_selection_shows_what_was_evaluated_not_beaten_and_delivered():
    evaluated = {"coarse": [[1e6, 0.5], [3e6, 0.6]], "fine": [[2e6, 0.7]]}
    front = [[1e6, 0.5], [2e6, 0.7]]
    figure = selection(evaluated, front, [("final", 2e6, 0.7), ("point-1", 1e6, 0.5)], largest=4e6, limit=2.5e6)
    by_name = {trace["name"]: trace for trace in figure["data"]}
    assert list(by_name) == ["evaluated, coarse", "evaluated, fine", "not beaten by any other", "delivered"]
    assert (by_name["evaluated, coarse"]["x"], by_name["evaluated, coarse"]["y"]) == ([1.0, 3.0], [50.0, 60.0])
    assert by_name["not beaten by any other"]["x"] == [1.0, 2.0]
    assert by_name["delivered"]["customdata"] == ["final", "point-1"]
    assert figure["layout"]["shapes"][0]["x0"] == 2.5
    assert "shapes" not in selection(evaluated, front, [("final", 2e6, 0.7)], largest=4e6, limit=None)["layout"]
