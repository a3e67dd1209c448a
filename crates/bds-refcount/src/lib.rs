//! Slab arena, generational handles and counted references.
