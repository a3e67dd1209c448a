//! Protocols hold the bytes; only they see a descriptor or socket.
