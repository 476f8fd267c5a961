"""``fastvq edit --serve``: a page in the browser where a part of a picture is edited.

``jobs.py`` runs what needs the model, one piece of work after another; ``session.py`` holds the states of one picture;
``views.py`` turns tensors into PNG pictures; ``server.py`` is the HTTP side, and ``guard.py`` refuses foreign
pages; ``static/`` is the page. Nothing of this package reads runs from disk: the command hands over ``Run`` objects.
"""

from fastvq.serve.session import LoadedRun, Run

__all__ = ["LoadedRun", "Run"]
