"""Where runs are computed: this machine's processes, Dask's workers or Ray's."""
