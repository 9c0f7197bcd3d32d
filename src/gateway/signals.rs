//! What a gateway is told by signals, from its first moment on: one that comes while it starts is heeded when it has started.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::telemetry::Problem;
use crate::wire::ErrorClass;

/// The signals that do not end this process by themselves any more.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    reload: Signal,
}

/// What one of them means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    Stop,
    Reload,
}

impl Signals {
    /// Begins to listen to SIGTERM, SIGINT and SIGHUP.
    ///
    /// # Errors
    /// The operating system does not let it.
    pub fn listen() -> Result<Self, Problem> {
        let failed = |error: std::io::Error| Problem::new(ErrorClass::Local, format!("signals: {error}"));
        // WHY: the gateway's runtime has threads, which come behind the sandbox. Signals are a process's and not a runtime's: this one has
        // no thread, goes at once, and what came until there is another is heard there.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let _within = runtime.enter();
        let listen = |kind| signal(kind).map_err(failed);
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            reload: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for the next one. To stop goes first.
    pub(super) async fn next(&mut self) -> Told {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
            _ = self.reload.recv() => Told::Reload,
        }
    }
}
