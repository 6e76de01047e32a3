"""The verbs: extract, train, validate. A folder of its own, so that `probecache.extract` can be the
function and not the module of that name.
"""
