//! Logs on stderr, and the one function that formats an error chain.

use std::error::Error;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not understood.
    #[error("invalid log filter `{filter}` in SEALANE_LOG: expected e.g. `info` or `sealane::engine=debug`")]
    Filter {
        /// As given.
        filter: String,
    },
    /// Somebody has set a logger already.
    #[error("logging is already set up in this process")]
    AlreadySet,
}

/// An error and all its sources on one line, each said once.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    let mut next = error.source();
    while let Some(source) = next {
        let said = source.to_string();
        // A transparent wrapper says its source's words already.
        if !last.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        last = said;
        next = source.source();
    }
    text
}

/// Sends logs to stderr, as JSON lines or for people; the filter is `SEALANE_LOG`, else `info`.
///
/// # Errors
/// The filter does not parse, or logging is set up already.
pub fn init_logging(json: bool) -> Result<(), LogError> {
    let text = std::env::var("SEALANE_LOG").unwrap_or_else(|_| "info".to_owned());
    let filter = EnvFilter::try_new(&text).map_err(|_| LogError::Filter { filter: text.escape_default().to_string() })?;
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let set = if json { builder.json().flatten_event(true).try_init() } else { builder.with_ansi(colour).try_init() };
    set.map_err(|_| LogError::AlreadySet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Outer {
        #[error("cannot read `{0}`")]
        Named(&'static str, #[source] std::io::Error),
        #[error(transparent)]
        Same(#[from] std::io::Error),
    }

    #[test]
    fn a_chain_says_each_link_once() {
        let gone = || std::io::Error::other("no such thing");
        assert_eq!(chain(&Outer::Named("a.toml", gone())), "cannot read `a.toml`: no such thing");
        assert_eq!(chain(&Outer::Same(gone())), "no such thing");
    }
}
