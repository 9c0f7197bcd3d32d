//! The process that speaks to a PKCS#11 token: started before the sandbox, for a gateway that can load no library and open no device.
//!
//! What makers of tokens ship wants files, sockets and threads of its own that nobody can list here, so this process is confined by
//! its user, without capabilities and without new privileges, and not by a list of system calls. It hears signature requests of one
//! gateway, and nothing of peers but the bytes that are to be signed.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::config::{Config, KeyFile};
use crate::gateway::launcher::companion;
use crate::identity::{Token, TokenPlan};
use crate::limits;
use crate::telemetry::{Problem, chain};
use crate::wire::ErrorClass;

/// What the process has to know, if the gateway's key is in a token.
pub(super) fn plan(config: &Config) -> Result<Option<TokenPlan>, Problem> {
    let KeyFile::Token(uri) = &config.identity.key else { return Ok(None) };
    if !cfg!(feature = "pkcs11") {
        let message = format!("identity.key: `{uri}`: this program was built without PKCS#11");
        return Err(Problem::new(ErrorClass::Misuse, message).with_code("configuration").with_hint("build it with `--features pkcs11`"));
    }
    let pin = config.identity.pkcs11_pin.as_ref().map(|file| {
        let message = format!("identity.pkcs11_pin: `{file}`: systemd gave this process no credentials: $CREDENTIALS_DIRECTORY is not set");
        file.path().ok_or_else(|| Problem::new(ErrorClass::Misuse, message).with_code("configuration"))
    });
    // The configuration has both or neither.
    let module = config.identity.pkcs11_module.clone().unwrap_or_default();
    Ok(Some(TokenPlan { module, uri: uri.clone(), pin: pin.transpose()?, user: config.gateway.user.clone() }))
}

/// Starts the process, where the key is in a token. It has to be done before the gateway gives up that it can.
///
/// # Errors
/// It cannot be started, or the token is not there, or has no such key.
pub(super) fn begin(config: &Config) -> Result<Option<Arc<Token>>, Problem> {
    let Some(plan) = plan(config)? else { return Ok(None) };
    let failed = |error: &dyn std::error::Error| Problem::new(ErrorClass::Local, format!("identity.key: `{}`: {}", plan.uri, chain(error)));
    let socket = companion("token", &plan).map_err(|error| failed(&error))?;
    let token = Token::over(socket, plan.uri.clone());
    token.ready(limits::TOKEN_READY_WITHIN).map_err(|error| failed(&error).with_hint("the process that speaks to it says why above"))?;
    Ok(Some(token))
}

/// Reads a plan from standard input, and serves the gateway at the other end of standard output until that ends.
///
/// # Errors
/// The token cannot be used.
pub fn run() -> Result<(), Problem> {
    let wrong = |why: String| Problem::new(ErrorClass::Local, why).with_hint("a gateway starts this itself");
    let plan: TokenPlan = serde_json::from_reader(std::io::stdin().lock()).map_err(|error| wrong(format!("standard input: {error}")))?;
    let socket = std::io::stdout().as_fd().try_clone_to_owned();
    serve(&socket.map_err(|error| wrong(format!("standard output: {error}")))?, &plan)
}

#[cfg(not(feature = "pkcs11"))]
fn serve(_: &OwnedFd, plan: &TokenPlan) -> Result<(), Problem> {
    Err(Problem::new(ErrorClass::Misuse, format!("`{}`: this program was built without PKCS#11", plan.uri)))
}

#[cfg(feature = "pkcs11")]
fn serve(socket: &OwnedFd, plan: &TokenPlan) -> Result<(), Problem> {
    let opened = open(plan)?;
    // A gateway that has ended is no failure.
    if let Err(error) = opened.serve(socket) {
        tracing::debug!(error = %chain(&error), "the gateway's socket");
    }
    Ok(())
}

/// Reads the PIN, gives up what the token's library must not have, and finds the key.
#[cfg(feature = "pkcs11")]
fn open(plan: &TokenPlan) -> Result<crate::identity::Opened, Problem> {
    use crate::gateway::sandbox::{Account, become_user, without_privileges};
    let failed = |error: &dyn std::error::Error| {
        Problem::new(ErrorClass::Local, format!("key `{}` by `{}`: {}", plan.uri, plan.module.display(), chain(error))).with_code("token")
    };
    let pin = crate::identity::read_pin(plan).map_err(|error| failed(&error))?;
    if let Some(user) = &plan.user {
        become_user(&Account::find(user)?)?;
    }
    without_privileges().map_err(|error| failed(&error))?;
    crate::identity::Opened::begin(plan, pin).map_err(|error| failed(&error))
}

/// For `doctor`: whether the token is there and has the key; nothing where the key is in a file.
pub(crate) fn check(config: &Config) -> Option<Result<(), Problem>> {
    begin(config).map(|token| token.map(drop)).transpose()
}
