# JupyterLab as `make lab` starts it: on the start notebook, also from the address that it prints
c.LabApp.default_url = "/lab/tree/nbs/31_start.ipynb"
# and it asks nobody outside this machine: no news (labconfig/), no look for updates, no catalogue of extensions, no search for language servers
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
c.LanguageServerManager.autodetect = False
