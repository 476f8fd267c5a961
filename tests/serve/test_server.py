"""The editing page's HTTP side: opening, editing, drafts, undo, downloads, limits and errors."""

import threading

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the page needs starlette")
pytest.importorskip("httpx2", reason="starlette's test client needs httpx2")

from starlette.testclient import TestClient

from fastvq.serve import Run, server
from fastvq.serve import session as session_module
from fastvq.serve.jobs import MAX_WAITING
from fastvq.serve.server import make_app
from fastvq.serve.session import Session
from tests.support.serve.page import Page, app, loaded, noise, pixels, runs

BOX = [4, 0, 12, 6]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def page():
    with TestClient(app()) as client:
        yield Page(client)


@pytest.fixture
def two_levels():
    with TestClient(app(levels=2, channels=3)) as client:
        yield Page(client)


def outside(height=16, width=16, box=BOX):
    mask = np.ones((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = False
    return mask


def test_the_page_and_its_files_are_served_with_security_headers(page):
    for path in ("/", "/static/page.js", "/static/api.js", "/static/region.js", "/static/style.css"):
        found = page.client.get(path)
        assert found.status_code == 200 and "default-src 'self'" in found.headers["content-security-policy"]
    assert page.client.get("/api/runs").json()["runs"] == ["tiny", "broken"]
    assert page.client.get("/static/../server.py").status_code == 404


def test_an_upload_is_opened_and_shown(page):
    data = noise()
    session = page.open(data, name="mine.png")
    assert (session["width"], session["height"], session["name"], session["edits"]) == (16, 16, "mine.png", 0)
    assert session["levels"][0]["codes"] == 16 and np.shape(session["levels"][0]["ids"]) == (4, 4)
    assert np.array_equal(page.picture(session), pixels(data))
    for view, shape in (("reconstruction", (16, 16)), ("ids-0", (4, 4, 3)), ("swatches-0", (20, 20))):
        assert page.picture(session, view).shape == shape
    assert (page.picture(session, "difference") == 128).all()
    assert page.client.get(f"/api/sessions/{session['id']}").json() == session


def test_held_out_pictures_carry_their_label(page):
    session = page.open(index=2)
    assert (session["name"], session["label"], session["held_out"]) == ("held-out 2", 2, 3)
    assert "held-out pictures are 0 .. 2, got 3" in page.open(index=3, state="failed")


@pytest.mark.parametrize("way", ["resample", "paint", "transplant"])
@pytest.mark.parametrize("region", ["box", "runs"])
def test_the_outside_keeps_every_bit(two_levels, way, region):
    page, data = two_levels, noise(20, 24, mode="RGB")
    session = page.open(data, size=16)
    before = page.picture(session)
    page.finish(
        page.client.post(f"/api/sessions/{session['id']}/source", params={"name": "b.png"}, content=noise(64, 40, 3))
    )
    where = {"box": BOX} if region == "box" else {"runs": [4, *[8, 8] * 5, 8, 4 + 10 * 16]}
    more = {
        "resample": {"label": 1, "drafts": 2, "candidates": 2, "seed": 5},
        "paint": {"codes": [3, 9]}, "transplant": {},
    }[way]  # fmt: skip
    session = page.edit(session, way=way, **where, **more)
    saved = page.client.get(f"/api/sessions/{session['id']}/picture.png")
    assert "attachment" in saved.headers["content-disposition"]
    after = pixels(saved.content)
    assert np.array_equal(after[outside()], before[outside()])
    assert not np.array_equal(after[~outside()], before[~outside()])
    assert np.array_equal(page.picture(session, "before"), before)
    ids = page.client.get(f"/api/sessions/{session['id']}/ids.json").json()
    assert ids["maps"] == [level["ids"] for level in session["levels"]] and ids["strides"] == [4, 2]
    if way == "paint":
        assert np.array(ids["maps"][0])[:2, 1:3].tolist() == [[3, 3], [3, 3]]


def test_drafts_are_chosen_and_undone(page):
    session = page.open(noise())
    first = page.picture(session)
    asked = {"way": "resample", "box": BOX, "label": 0, "drafts": 3, "candidates": 1, "seed": 3, "temperature": 1.5}
    session = page.edit(session, **asked)
    assert (session["drafts"], session["chosen"], session["seed"], session["edits"]) == (3, 0, 3, 1)
    drafts = [page.picture(session, f"draft-{i}") for i in range(3)]
    assert np.array_equal(page.picture(session), drafts[0])
    path = f"/api/sessions/{session['id']}"
    session = page.client.post(f"{path}/choose", json={"draft": 2}).json()
    assert session["chosen"] == 2 and session["edits"] == 1
    assert np.array_equal(page.picture(session), drafts[2])
    assert page.client.post(f"{path}/choose", json={"draft": 3}).status_code == 400
    session = page.client.post(f"{path}/undo").json()
    assert np.array_equal(page.picture(session), first) and session["edits"] == 0
    assert page.client.post(f"{path}/undo").json()["error"] == "there is no edit to undo"
    again = page.edit(session, **asked)
    assert [level["ids"] for level in again["levels"]] != [level["ids"] for level in session["levels"]]
    assert np.array_equal(page.picture(again), drafts[0])  # the seed decides


def test_edits_add_up(page):
    session = page.open(noise())
    first = page.picture(session)
    session = page.edit(session, way="paint", box=[0, 0, 4, 4], codes=[5])
    second = page.picture(session)
    session = page.edit(session, way="paint", box=[8, 8, 16, 16], codes=[2])
    third = page.picture(session)
    assert np.array_equal(third[:8, :8], second[:8, :8]) and np.array_equal(second[4:], first[4:])
    ids = np.array(session["levels"][0]["ids"])
    assert ids[0, 0] == 5 and (ids[2:, 2:] == 2).all()


def test_a_soft_edge_fades_inside_the_region(page):
    session = page.open(noise())
    before = page.picture(session).astype(int)
    hard = page.picture(page.edit(session, way="paint", box=[2, 2, 14, 14], codes=[5])).astype(int)
    session = page.client.post(f"/api/sessions/{session['id']}/undo").json()
    soft = page.picture(page.edit(session, way="paint", box=[2, 2, 14, 14], codes=[5], soft=2)).astype(int)
    mask = outside(box=[2, 2, 14, 14])
    assert np.array_equal(soft[mask], before[mask])
    assert np.array_equal(soft[4:12, 4:12], hard[4:12, 4:12])
    edge = before[2, 2:14] + (hard[2, 2:14] - before[2, 2:14]) / 3
    assert np.abs(soft[2, 2:14] - edge).max() <= 0.5


BAD = [
    (dict(way="paint", codes=[3]), "the region must be given as a box or as runs"),
    (dict(way="paint", codes=[3], box=[4, 4, 4, 8]), "the box must be x0, y0, x1, y1"),
    (dict(way="paint", codes=[3], runs=[200, 50]), "the region must have 16 x 16 pixels, got 250"),
    (dict(way="paint", codes=[3], runs=[256]), "the region is empty"),
    (dict(way="smudge", box=BOX), "way must be one of"),
    (dict(way="paint", box=BOX, codes="3"), "codes must be a list"),
    (dict(way="paint", box=BOX, codes=[3], extra=1), "nothing else"),
    (dict(way="resample", box=BOX, label=0, drafts=99), "whole number in 1 .. 12"),
]
FAILING = [
    (dict(way="paint", box=BOX), "choose a code to paint with"),
    (dict(way="paint", box=BOX, codes=[16]), "must hold ids in 0 .. 15"),
    (dict(way="transplant", box=BOX), "choose a picture to transplant from"),
    (dict(way="resample", box=BOX), "label must be one of the prior's classes, 0 .. 3, got None"),
    (dict(way="resample", box=BOX, label=9), "0 .. 3, got 9"),
    (dict(way="resample", box=BOX, label=1, temperature=-1), "temperature must be >= 0"),
]


def test_bad_edits_are_refused_in_one_line(page):
    session = page.open(noise())
    for asked, message in BAD:
        answer = page.client.post(f"/api/sessions/{session['id']}/edit", json=asked)
        assert answer.status_code == 400 and message in answer.json()["error"], answer.text
    for asked, message in FAILING:
        error = page.edit(session, state="failed", **asked)
        assert message in error and "\n" not in error
    now = page.client.get(f"/api/sessions/{session['id']}").json()
    assert now == session


def test_bad_uploads_are_refused_by_the_reader_of_the_command(page, monkeypatch):
    for data, message in (
        (b"no picture", "no picture of a known format"),
        (noise(4, 4), "too small: 4x4"),
        (noise()[:60], "cannot be read"),
    ):
        assert message in page.open(data, state="failed")
    assert "choose a side to scale it to" not in page.open(noise(1200, 1100), state="done", size=16)["name"]
    assert page.client.post("/api/open", params={"run": "tiny", "size": 5000}, content=noise()).status_code == 400
    assert page.client.post("/api/open", params={"run": "other"}, content=noise()).status_code == 404
    assert "this run is damaged" in page.open(noise(), run="broken", state="failed")
    monkeypatch.setattr(server, "MAX_UPLOAD", 1 << 20)
    answer = page.client.post("/api/open", params={"run": "tiny"}, content=bytes((1 << 20) + 1))
    assert answer.status_code == 413 and answer.json()["error"] == "the picture must have at most 1 MiB"


def test_a_run_without_priors_says_what_to_do():
    with TestClient(app(prior=False)) as client:
        page = Page(client)
        session = page.open(noise())
        assert not session["prior"] and session["why_no_prior"] == "train a prior first"
        assert page.edit(session, state="failed", way="resample", box=BOX) == "train a prior first"


def test_other_sites_cannot_reach_the_page(page):
    session = page.open(noise())
    path = f"/api/sessions/{session['id']}/undo"
    assert page.client.post(path, headers={"origin": "http://elsewhere.example"}).status_code == 403
    assert page.client.post(path, headers={"origin": "http://testserver"}).status_code == 400  # nothing to undo
    assert page.client.get("/api/runs", headers={"host": "elsewhere.example"}).status_code == 400


def test_refusals_carry_the_security_headers_too(page):
    foreign = page.client.get("/api/runs", headers={"host": "elsewhere.example"})
    other_page = page.client.post("/api/open?run=tiny", headers={"origin": "http://elsewhere.example"})
    odd_origin = page.client.post("/api/open?run=tiny", headers={"origin": "http://["})
    for answer, status in ((foreign, 400), (other_page, 403), (odd_origin, 403), (page.client.get("/"), 200)):
        assert answer.status_code == status
        policy = answer.headers["content-security-policy"]
        assert "base-uri 'none'" in policy and "form-action 'self'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "elsewhere.example" in foreign.json()["error"] and "elsewhere.example" in other_page.json()["error"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("[::1]:8765", 200), ("[::1]", 200), ("LOCALHOST:1", 200), ("127.0.0.1", 200), ("[::2]:8765", 400), ("::1", 400),
     ("localhost:8765:1", 400), ("localhost@elsewhere.example", 400), ("", 400)],
)  # fmt: skip
def test_hosts_are_compared_without_port_and_brackets(host, status):
    with TestClient(make_app(runs())) as client:
        assert client.get("/api/runs", headers={"host": host}).status_code == status


def test_a_number_in_the_address_is_checked_by_its_value(page):
    for size in ("0" * 18 + "60000", "0" * 21 + "60000", "0" * 5000 + "16", "1025", "-1", "1e2"):
        answer = page.client.post("/api/open", params={"run": "tiny", "size": size}, content=noise())
        assert answer.status_code == 400 and "size must be a whole number in 1 .. 1024" in answer.json()["error"], size


def test_a_large_picture_is_refused_before_it_is_decoded(page, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("decoded")

    monkeypatch.setattr(session_module, "read_fitting", never)
    run = loaded()
    for size, data in ((60000, noise()), (None, noise(1200, 8))):
        with pytest.raises(ValueError, match="more than 1024 a side"):
            Session.open(run, "tiny", data=data, name="a.png", index=0, size=size)


def test_the_id_of_a_job_cannot_be_guessed(page):
    ids = [page.client.post("/api/open?run=tiny").json()["job"] for _ in range(3)]
    assert len(set(ids)) == 3 and all(isinstance(key, str) and len(key) >= 16 for key in ids)
    for guess in (1, 2, 3):
        assert page.client.get(f"/api/jobs/{guess}").status_code == 404


def test_the_state_before_is_read_under_the_lock():
    session = Session.open(loaded(), "tiny", data=noise(), name="a.png", index=0, size=16)
    first = session.states[0]

    class UndoneMeanwhile(list):
        """Lets another thread undo the edit between the count and the read."""

        thread = None

        def __len__(self):
            count = super().__len__()
            if self.thread is None:
                self.thread = threading.Thread(target=session.undo)
                self.thread.start()
                self.thread.join(0.2)
            return count

    session.states = states = UndoneMeanwhile([first, first._replace(pixels=first.pixels + 1)])
    assert session.before is first
    states.thread.join()
    assert len(states) == 1


def test_what_is_not_there_is_named(page):
    session = page.open(noise())
    for path in ("/api/jobs/999", f"/api/jobs/{'9' * 5000}", f"/api/sessions/{'a' * 5000}",
                 f"/api/sessions/{session['id']}/views/ids-{'9' * 5000}",
                 f"/api/sessions/{session['id']}/views/swatches-{'9' * 5000}", "/api/sessions/none",
                 f"/api/sessions/{session['id']}/views/draft-0",
                 f"/api/sessions/{session['id']}/views/swatches-7"):  # fmt: skip
        found = page.client.get(path)
        assert found.status_code == 404 and found.json()["error"]


def test_a_long_draw_shows_its_progress_and_can_be_cancelled(page):
    session = page.open(noise(512, 512), size=512)
    job = page.client.post(
        f"/api/sessions/{session['id']}/edit",
        json={"way": "resample", "box": [0, 0, 512, 512], "label": 1, "drafts": 2, "candidates": 1},
    )
    path = f"/api/jobs/{job.json()['job']}"
    waiting = page.client.post(f"/api/sessions/{session['id']}/edit", json={"way": "paint", "box": BOX, "codes": [1]})
    seen = set()
    while not any(0 < share < 1 for share in seen):
        now = page.client.get(path).json()
        assert now["state"] in ("waiting", "running")
        seen.add(now["progress"])
    assert page.client.get(f"/api/jobs/{waiting.json()['job']}").json()["ahead"] == 1
    page.client.post(f"{path}/cancel")
    assert page.finish(job, state="cancelled") is None
    assert page.finish(waiting)["edits"] == 1


def test_a_full_queue_refuses_more_work(monkeypatch):
    hold = threading.Event()

    def load():
        hold.wait(30)
        return loaded()

    with TestClient(make_app([Run("slow", load)], hosts=["testserver"])) as client:
        try:
            answers = [client.post("/api/open?run=slow", content=noise()) for _ in range(MAX_WAITING + 2)]
            assert answers[-1].status_code == 503 and "try again" in answers[-1].json()["error"]
            monkeypatch.setattr(server, "_body", None)  # an upload is refused without a look at its body
            assert client.post("/api/open?run=slow", content=noise()).status_code == 503
        finally:
            hold.set()
