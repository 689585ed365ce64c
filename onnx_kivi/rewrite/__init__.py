"""Model in, model out: `pipeline` is the way in, its steps are a module each, values pass from one to the next.

readable     Model -> Graph, or why it can't be looked into
admit        Graph -> Admitted: the one loop around the steps that find, match, read, refuse and plan
  search       Graph, caches -> Reading: candidates of all families, their masks read, and misses
  vanishing    candidates -> those that can't be cut out, and why
  plan         candidates -> Plan: what takes the place of the shapes that go with them
numbering    candidates -> sites: the number of their layer
leftovers    caches that no site took -> misses
emit         sites and plan -> the changed model (emit_site, emit_shapes, layout_nodes)
check        the changed model -> nothing, or an error: what holds of every rewritten model
"""
