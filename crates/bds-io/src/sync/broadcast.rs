//! Queues of events: each receiver has a bounded queue of its own, and sending never waits.

use tokio::sync::broadcast as imp;

/// Sends values to all receivers. Clones send to the same ones.
#[derive(Clone, Debug)]
pub struct Sender<T>(imp::Sender<T>);

impl<T: Clone> Sender<T> {
    /// A sender without receivers, whose receivers may be `capacity` values behind.
    ///
    /// # Panics
    /// If `capacity` is 0.
    pub fn new(capacity: usize) -> Self {
        Self(imp::Sender::new(capacity))
    }

    /// Puts a value into every receiver's queue. A full queue loses its oldest value, and its
    /// receiver gets [`error::RecvError::Lagged`].
    ///
    /// # Errors
    /// The value, if there is no receiver.
    pub fn send(&self, value: T) -> Result<(), T> {
        self.0.send(value).map(drop).map_err(|imp::error::SendError(value)| value)
    }

    /// A receiver of the values sent from now on.
    pub fn subscribe(&self) -> Receiver<T> {
        Receiver(self.0.subscribe())
    }
}

impl<T> Sender<T> {
    /// Number of receivers.
    pub fn receiver_count(&self) -> usize {
        self.0.receiver_count()
    }
}

/// Receives values in the order they were sent.
#[derive(Debug)]
pub struct Receiver<T>(imp::Receiver<T>);

impl<T: Clone> Receiver<T> {
    /// Waits for the next value. Dropping the future loses no value.
    ///
    /// # Errors
    /// [`error::RecvError`] if values were lost, or all senders are gone and every value was
    /// received.
    pub async fn recv(&mut self) -> Result<T, error::RecvError> {
        self.0.recv().await.map_err(|error| match error {
            imp::error::RecvError::Closed => error::RecvError::Closed,
            imp::error::RecvError::Lagged(count) => error::RecvError::Lagged(count),
        })
    }

    /// The next value if it is there.
    ///
    /// # Errors
    /// [`error::TryRecvError`] if there is none now, or as for [`recv`](Self::recv).
    pub fn try_recv(&mut self) -> Result<T, error::TryRecvError> {
        self.0.try_recv().map_err(|error| match error {
            imp::error::TryRecvError::Empty => error::TryRecvError::Empty,
            imp::error::TryRecvError::Closed => error::TryRecvError::Closed,
            imp::error::TryRecvError::Lagged(count) => error::TryRecvError::Lagged(count),
        })
    }
}

/// Errors of receiving.
pub mod error {
    use std::fmt;

    /// Why [`Receiver::recv`](super::Receiver::recv) gave no value.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum RecvError {
        /// All senders are gone, and every value was received.
        Closed,
        /// So many of the oldest values were lost; the next call gives the oldest that is left.
        Lagged(u64),
    }

    /// Why [`Receiver::try_recv`](super::Receiver::try_recv) gave no value.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum TryRecvError {
        /// There is none now.
        Empty,
        /// All senders are gone, and every value was received.
        Closed,
        /// So many of the oldest values were lost; the next call gives the oldest that is left.
        Lagged(u64),
    }

    impl fmt::Display for RecvError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self {
                Self::Closed => f.write_str("all senders are gone"),
                Self::Lagged(count) => write!(f, "{count} values were lost"),
            }
        }
    }

    impl fmt::Display for TryRecvError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self {
                Self::Empty => f.write_str("there is no value now"),
                Self::Closed => f.write_str("all senders are gone"),
                Self::Lagged(count) => write!(f, "{count} values were lost"),
            }
        }
    }

    impl std::error::Error for RecvError {}
    impl std::error::Error for TryRecvError {}
}
