//! Block graph, driver contract and request path.
#![forbid(unsafe_code)]
