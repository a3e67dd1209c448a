//! Request limits of a node: alignment, length, number of segments.

/// Limits of a node, in bytes. Zero means: no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths are multiples of this power of two (1 to 1 GiB). The request path widens
    /// requests to it.
    pub request_alignment: u32,
    /// Buffers' addresses and lengths should be multiples of this.
    pub memory_alignment: u32,
    /// Longest data request.
    pub max_transfer: u64,
    /// Best size of a data request.
    pub opt_transfer: u64,
    /// Most segments of a data request.
    pub max_iov: u32,
    /// Zero writes work best on multiples of this.
    pub zero_alignment: u32,
    /// Longest zero write.
    pub max_zero: u64,
    /// Discards work on multiples of this.
    pub discard_alignment: u32,
    /// Longest discard.
    pub max_discard: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            memory_alignment: 1,
            max_transfer: 0,
            opt_transfer: 0,
            max_iov: 1024,
            zero_alignment: 1,
            max_zero: 0,
            discard_alignment: 1,
            max_discard: 0,
        }
    }
}
