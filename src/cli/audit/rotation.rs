//! `sealane audit rotate-key`: the log of a gateway goes on with another signing key.

use std::path::Path;
use std::sync::Arc;

use super::problem;
use crate::audit::{self, AuditLog};
use crate::cli::Ending;
use crate::cli::output::Out;
use crate::control::Exit;
use crate::identity::Signer;
use crate::telemetry::{Problem, chain};

/// A key that signs under the name of the log.
struct LogKey {
    signer: Signer,
    name: String,
}

impl audit::Signer for LogKey {
    fn sign(&self, bytes: &[u8]) -> Result<[u8; 64], String> {
        self.signer.sign(bytes).map_err(|error| error.to_string())
    }

    fn public_key(&self) -> [u8; 32] {
        self.signer.public_key()
    }

    fn name(&self) -> &str {
        &self.name
    }
}

pub(super) fn rotate_key(directory: &Path, old: &Path, new: &Path, out: Out) -> Ending {
    let origin = audit::origin(directory).map_err(|error| problem(&error))?;
    let key = |path: &Path| {
        let signer = Signer::read(path).map_err(|error| Problem::new(error.class(), chain(&error)).with_code("identity"))?;
        Ok::<Arc<dyn audit::Signer>, Problem>(Arc::new(LogKey { signer, name: origin.clone() }))
    };
    let entries = AuditLog::rotate_key(directory, &key(old)?, &key(new)?).map_err(|error| {
        let hint = "the gateway must not run, and `--old-key` must be the key that signed the log last";
        problem(&error).with_hint(hint)
    })?;
    out.talk(&format!(
        "audit log `{}` of {entries} entries goes on with `{}`; put it in `identity.signing_key`",
        directory.display(),
        new.display()
    ));
    Ok(Exit::Done)
}
