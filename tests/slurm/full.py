"""The default campaign on a cluster, without and with accounting: `make test-slurm-full`."""

import cluster
import pytest
from project import copy_of
from test_slurm import NODES, Controller, jobs

from posttrain.ground.files import read_json


@pytest.mark.parametrize("accounting", [False, True])
def test_the_default_campaign(root, tmp_path, accounting):
    folder, project = tmp_path / "slurm", copy_of(root, tmp_path / "project")
    cluster.up(folder, nodes=NODES, gpus=1, accounting=accounting)
    account = "account: lab\n" if accounting else ""
    (project / "slurm/site.yaml").write_text(f"{account}stages: {{base: {{runtime: 60}}}}\n")
    try:
        run = Controller(project, folder)
        assert run.end(5400) == 0, run.said()[-3000:]
        ended = [fields["JobState"] for fields in jobs(folder).values()]
        assert set(ended) <= {"COMPLETED"}
        assert read_json(project / "results/report/metrics.json")
        again = Controller(project, folder, "-n")
        assert again.end(120) == 0 and "Nothing to be done" in again.said()
    finally:
        cluster.down(folder)
