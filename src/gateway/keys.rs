//! The private keys of the gateway, each in a process of its own that was started before the sandbox. It signs what its key is for, and
//! hears nothing of peers but the bytes that are to be signed.
//!
//! One that has the key of a file is confined to reading that and to signing. One whose key is in a token is confined by its user, without
//! capabilities and without new privileges, and not by a list: what makers of tokens ship wants files, sockets and threads that nobody can
//! list here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::audit::{Event, is_signed_by_logs};
use crate::companion::companion;
use crate::config::{Config, KeyFile};
use crate::gateway::Gateway;
use crate::gateway::launcher::{self, Launcher};
use crate::gateway::sandbox::{self, Account, become_user, without_privileges};
use crate::identity::{Apart, Credentials, FileKeys, Holder, KeyPlace, Keys, TokenPlace, is_handshake, serve_keys};
use crate::limits;
use crate::telemetry::{Problem, chain};
use crate::wire::{ErrorClass, HandoffMessage};

/// What the process has to know; it finds it on standard input.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    purpose: Purpose,
    place: KeyPlace,
    /// Whose process it becomes.
    user: Option<String>,
    /// `gateway.sandbox`.
    sandbox: String,
}

/// What its key signs.
#[derive(Debug, Serialize, Deserialize)]
enum Purpose {
    /// Handshakes of TLS 1.3.
    Handshakes,
    /// Handoff messages, heads of the log with this origin, and as a witness those of others.
    Evidence { origin: String, witnessed: Vec<String> },
}

/// What everybody is told of processes that are not there any more.
const TLS_KEY_ENDED: &str = "the process that holds `identity.key` has ended, so no session comes about any more: restart the gateway; \
                             the VMs that run here run on meanwhile";
const SIGNING_KEY_ENDED: &str = "the process that holds `identity.signing_key` has ended, so no handoff is signed and nothing is recorded \
                                 in the audit log: restart the gateway; the VMs that run here run on meanwhile";

/// The file of a key; what stands for it in messages where it is in a token.
pub(super) fn place(key: &str, file: &KeyFile) -> Result<PathBuf, Problem> {
    if let KeyFile::Token(uri) = file {
        return Ok(PathBuf::from(uri.to_string()));
    }
    let message = format!("identity.{key}: `{file}`: systemd gave this process no credentials: $CREDENTIALS_DIRECTORY is not set");
    let missing = || Problem::new(ErrorClass::Misuse, message).with_code("configuration");
    file.path().ok_or_else(|| missing().with_hint("the unit needs `LoadCredential=NAME:FILE` or `LoadCredentialEncrypted=NAME:FILE`"))
}

/// Starts both processes. It has to be done before the gateway gives up that it can.
///
/// # Errors
/// One cannot be started, or its token is not there, or has no such key.
pub(super) fn begin(config: &Config, launcher: &Launcher) -> Result<Apart, Problem> {
    let identity = &config.identity;
    let own = Credentials::id_in(&identity.certificate);
    let origin = own.map_err(|error| Problem::new(error.class(), chain(&error)).with_code("identity"))?.to_string();
    let witnessed = config.peers.iter().map(|peer| peer.spiffe.to_string()).collect();
    let tls = start(config, "key", &identity.key, Purpose::Handshakes)?;
    if matches!(identity.key, KeyFile::Token(_)) {
        // WHY: the other one may use the same PIN. A wrong one is tried once.
        ready("key", &tls)?;
    }
    let signing = start(config, "signing_key", &identity.signing_key, Purpose::Evidence { origin, witnessed })?;
    ready("key", &tls)?;
    ready("signing_key", &signing)?;
    Ok(Apart { tls, signing, files: Arc::new(launcher.clone()) })
}

fn start(config: &Config, key: &str, file: &KeyFile, purpose: Purpose) -> Result<Arc<Holder>, Problem> {
    let (user, sandbox) = (config.gateway.user.clone(), config.gateway.sandbox.to_string());
    let place = match file {
        KeyFile::Token(_) => KeyPlace::Token(token(config, key, file)?),
        file => KeyPlace::File(std::path::absolute(place(key, file)?).unwrap_or_default()),
    };
    let socket = companion(&["key-holder", key], &Plan { purpose, place, user, sandbox });
    let socket =
        socket.map_err(|error| Problem::new(ErrorClass::Local, format!("identity.{key}: its process cannot be started: {error}")))?;
    Ok(Holder::over(socket, file.to_string()))
}

fn ready(key: &str, holder: &Holder) -> Result<(), Problem> {
    holder.ready(limits::TOKEN_READY_WITHIN).map_err(|error| {
        let problem = Problem::new(ErrorClass::Local, format!("identity.{key}: `{}`: {}", holder.name(), chain(&error)));
        problem.with_hint("that process says why above")
    })
}

/// Where a token and its PIN are.
fn token(config: &Config, key: &str, file: &KeyFile) -> Result<TokenPlace, Problem> {
    let KeyFile::Token(uri) = file else { return Err(Problem::new(ErrorClass::Bug, format!("identity.{key}: in no token"))) };
    if !cfg!(feature = "pkcs11") {
        let message = format!("identity.{key}: `{uri}`: this program was built without PKCS#11");
        return Err(Problem::new(ErrorClass::Misuse, message).with_code("configuration").with_hint("build it with `--features pkcs11`"));
    }
    let pin = config.identity.pkcs11_pin.as_ref().map(|file| place("pkcs11_pin", file)).transpose()?;
    // The configuration has both or neither.
    let module = config.identity.pkcs11_module.clone().unwrap_or_default();
    Ok(TokenPlace { module, uri: uri.clone(), pin })
}

/// Reads a plan from standard input, and serves the gateway at the other end of standard output until that ends.
///
/// # Errors
/// The key cannot be used, or what has to be given up cannot.
pub fn run() -> Result<(), Problem> {
    let wrong = |why: String| Problem::new(ErrorClass::Local, why).with_hint("a gateway starts this itself");
    let plan: Plan = serde_json::from_reader(io::stdin().lock()).map_err(|error| wrong(format!("standard input: {error}")))?;
    let socket = io::stdout().as_fd().try_clone_to_owned();
    let socket = socket.map_err(|error| wrong(format!("standard output: {error}")))?;
    let nothing = File::open("/dev/null").and_then(|nothing| Ok(rustix::stdio::dup2_stdin(nothing)?));
    nothing.map_err(|error| wrong(format!("standard input: {error}")))?;
    match &plan.place {
        KeyPlace::File(path) => hold_file(&socket, &plan, path),
        KeyPlace::Token(place) => hold_token(&socket, &plan, place),
    }
}

fn hold_file(socket: &OwnedFd, plan: &Plan, path: &Path) -> Result<(), Problem> {
    let failed = |error: io::Error| Problem::new(ErrorClass::Local, format!("key `{}`: {error}", path.display()));
    if let Some(user) = &plan.user {
        become_user(&Account::find(user)?)?;
    }
    without_privileges().map_err(failed)?;
    sandbox::hold_key(plan.sandbox.parse().unwrap_or(crate::config::Sandboxing::Require), path)?;
    let mut keys = match plan.purpose {
        Purpose::Handshakes => FileKeys::of_handshakes(path.to_owned()),
        Purpose::Evidence { .. } => FileKeys::of_evidence(path.to_owned()),
    };
    plan.serve(socket, &mut keys);
    Ok(())
}

impl Plan {
    fn serve(&self, socket: &OwnedFd, keys: &mut dyn Keys) {
        // A gateway that has ended is no failure.
        if let Err(error) = serve_keys(socket, keys, &|message| self.purpose.fits(message)) {
            tracing::debug!(error = %chain(&error), "the gateway's socket");
        }
    }
}

impl Purpose {
    /// Whether a message is of the kinds that the key is for.
    fn fits(&self, message: &[u8]) -> Result<(), &'static str> {
        match self {
            Self::Handshakes => is_handshake(message),
            Self::Evidence { origin, witnessed } => {
                let evidence = HandoffMessage::is_signed_bytes(message) || is_signed_by_logs(message, origin, witnessed);
                if evidence { Ok(()) } else { Err("handoff messages, heads of the own log, and those of peers as a witness") }
            }
        }
    }
}

#[cfg(not(feature = "pkcs11"))]
fn hold_token(_: &OwnedFd, _: &Plan, place: &TokenPlace) -> Result<(), Problem> {
    Err(Problem::new(ErrorClass::Misuse, format!("`{}`: this program was built without PKCS#11", place.uri)))
}

/// Reads the PIN, gives up what the token's library must not have, and finds the key.
#[cfg(feature = "pkcs11")]
fn hold_token(socket: &OwnedFd, plan: &Plan, place: &TokenPlace) -> Result<(), Problem> {
    let failed = |error: &dyn std::error::Error| {
        Problem::new(ErrorClass::Local, format!("key `{}` by `{}`: {}", place.uri, place.module.display(), chain(error))).with_code("token")
    };
    let pin = crate::identity::read_pin(place).map_err(|error| failed(&error))?;
    if let Some(user) = &plan.user {
        become_user(&Account::find(user)?)?;
    }
    without_privileges().map_err(|error| failed(&error))?;
    let mut opened = crate::identity::Opened::begin(place, pin).map_err(|error| failed(&error))?;
    plan.serve(socket, &mut opened);
    Ok(())
}

/// For `doctor`: of each key that is in a token, which it is, and whether the token is there and has it.
pub(crate) fn check_tokens(config: &Config) -> Vec<(String, Result<(), Problem>)> {
    let evidence = Purpose::Evidence { origin: String::new(), witnessed: Vec::new() };
    let keys = [("key", &config.identity.key, Purpose::Handshakes), ("signing_key", &config.identity.signing_key, evidence)];
    let in_tokens = keys.into_iter().filter(|(_, file, _)| matches!(file, KeyFile::Token(_)));
    let check = |(key, file, purpose)| (format!("{file}"), start(config, key, file, purpose).and_then(|holder| ready(key, &holder)));
    in_tokens.map(check).collect()
}

impl Gateway {
    /// What has ended that cannot be started again, with the event that says so.
    pub(super) fn lost(&self) -> Vec<(Event, &'static str)> {
        let lost = [
            (self.launcher.has_ended(), Event::LauncherEnded, launcher::ENDED),
            (self.keys.tls.has_ended(), Event::KeyHolderEnded, TLS_KEY_ENDED),
            (self.keys.signing.has_ended(), Event::KeyHolderEnded, SIGNING_KEY_ENDED),
        ];
        lost.into_iter().filter_map(|(ended, event, why)| ended.then_some((event, why))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Epoch, Incarnation, MigrationId, VmUuid};
    use crate::wire::Handoff;

    const OWN: &str = "spiffe://dc1.example.net/gateway/gw-a";
    const PEER: &str = "spiffe://dc2.example.net/gateway/gw-b";

    fn head(origin: &str) -> String {
        format!("{origin}\n7\n{}=\n", "A".repeat(43))
    }

    #[test]
    fn the_key_of_evidence_signs_handoffs_own_heads_and_those_of_peers_as_a_witness_and_nothing_else() {
        let purpose = Purpose::Evidence { origin: OWN.to_owned(), witnessed: vec![PEER.to_owned()] };
        let handoff = HandoffMessage {
            migration: MigrationId([1; 16]),
            uuid: VmUuid([2; 16]),
            epoch: Epoch(3),
            sender: Incarnation([4; 16]),
            receiver: Incarnation([5; 16]),
            position: 6,
            step: Handoff::Running,
        };
        let (handoff, own) = (handoff.signed_bytes(), head(OWN));
        let witness = format!("cosignature/v1\ntime 1700000000\n{}", head(PEER));
        for good in [handoff.as_slice(), own.as_bytes(), witness.as_bytes()] {
            purpose.fits(good).unwrap();
        }
        let handshake = [[b' '; 64].as_slice(), b"TLS 1.3, server CertificateVerify\0", &[7; 32]].concat();
        let mut wrong = vec![handshake, b"anything".to_vec(), Vec::new(), [handoff.as_slice(), &[0]].concat(), handoff[1..].to_vec()];
        wrong.extend((1..handoff.len()).map(|length| handoff[..length].to_vec()));
        wrong.extend((1..own.len()).map(|length| own.as_bytes()[..length].to_vec()));
        wrong.extend(
            [
                head(PEER),
                head("spiffe://dc1.example.net/gateway/gw-c"),
                format!("{own}\n"),
                format!("{own}more\n"),
                own.replace("\n7\n", "\n07\n"),
                own.replace("AA=", "AB="),
                format!("cosignature/v1\ntime 1700000000\n{own}"),
                format!("cosignature/v1\ntime 1700000000\n{}", head("spiffe://dc9.example.net/gateway/gw-z")),
                witness.replace("time 17", "time 017"),
                witness.replace("time 17", "time -17"),
                witness.replace("/v1", "/v2"),
                format!("cosignature/v1\ntime 1\n{witness}"),
            ]
            .map(String::into_bytes),
        );
        for message in wrong {
            assert!(purpose.fits(&message).is_err(), "{:?}", String::from_utf8_lossy(&message));
        }
        assert!(Purpose::Handshakes.fits(&handoff).is_err() && Purpose::Handshakes.fits(own.as_bytes()).is_err());
    }
}
