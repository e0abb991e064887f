"""Layer: integrations. Conda in torchtitan 0.3: ``--optimizer.name conda``.

There are three ways to select it. All use torchtitan's own interfaces; nothing is patched:

* ``torchrun ... -m conda_dist.integrations.torchtitan.train --module llama3 --config llama3_8b
  --optimizer.name conda``: the launcher, for any torchtitan module and config;
* ``torchrun ... -m torchtitan.train --module conda_dist.integrations.torchtitan --config
  llama3.llama3_8b --optimizer.name conda``: the command line that the launcher builds;
* ``--override.imports 'conda_dist.integrations.torchtitan.override.conda={"lr": 0.01}'``.

``container`` is the optimizer container, ``config_registry`` wraps torchtitan's configs, ``train``
is the launcher and ``override`` the override. Importing this package does not import torchtitan.
"""
