//! The tunnel: authenticated QUIC sessions with a control stream, and lanes for bulk bytes, all behind one UDP port.
//!
//! *Owns:* sockets, QUIC and TLS settings, admission of strangers, who the peer is, which thread a lane runs on, the
//! binding of lanes to their session, how much is on its way and in buffers. *Never:* what bytes mean beyond the framing of
//! control messages; policy; 0-RTT, resumption, datagrams, or any byte of ours before the peer is verified.
//!
//! ```text
//!                    one UDP port, SO_REUSEPORT group, BPF on the connection ID
//!   peers ──────────┬── socket 0 ── the gateway's runtime ── Session  (control stream)
//!                   ├── socket 1 ── thread lane-in-1 ─────── LaneIo …  (handler of `expect_lanes`)
//!                   └── socket N ── thread lane-in-N ─────── LaneIo …
//!   ours  ──────────┬── any port ── the gateway's runtime ── Session
//!                   └── any port ── thread lane-out-L ────── LaneIo    (task of `open_lane`)
//! ```
//!
//! *Invariants:*
//! - `one-port`: peers only ever see the listening port, and a datagram reaches its thread wherever it came from.
//! - `verified-first`: no stream can be opened, and no more than a small window be sent, before the peer's chain is verified.
//! - `bound-lanes`: a lane has the SPIFFE ID and key of its session and a tag that ties both TLS connections together.
//! - `bounded`: handshakes, sessions, lanes, queues and buffers have limits from `limits.rs`.
//! - `reported`: every connection that is not admitted comes out of `Endpoint::accept` as [`Refused`].
//!
//! QUIC's own "migration" is called *path change* here.
//!
//! *Read first:* `endpoint.rs`, `session.rs`, `lane.rs`, `join.rs`; then `steer.rs` and `worker.rs`; `door.rs` and `doorstep.rs` are
//! about strangers; `congestion.rs` stands alone.

#![deny(clippy::indexing_slicing)]

mod buffers;
mod config;
mod congestion;
mod door;
mod doorstep;
mod endpoint;
mod error;
mod gather;
mod handshake;
mod join;
mod lane;
mod session;
mod socket;
mod steer;
mod tls;
mod worker;

#[cfg(test)]
mod tests;

pub use config::{Congestion, TransportConfig};
pub use endpoint::Endpoint;
pub use error::{LaneRefusal, Refused, TransportError};
pub use join::{LaneGate, LaneHandler};
pub use lane::{LaneHandle, LaneIo, LaneReceiver, LaneSender};
pub use session::{LinkStats, Session};
pub use tls::ChannelFacts;
