"""Where rows come from: embedded sets, image folders, CSV files, the hub."""
