//! Device state that is not what a guest saved, restored by a real KVM twin.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use sealane::hypervisor::PagedSource;
use sealane::hypervisor::attach::{AttachedSource, Timeouts};
use sealane::telemetry::ErrorClass;
use sealane::wire::{Handoff, Message};

use crate::lab::{EVIL, Lab, until, uuid};
use crate::source::{Evil, LANES, takes_an_honest_vm};

/// A KVM guest of ours, paused; ended with this.
struct Guest {
    process: Child,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn guest(lab: &Lab) -> (Guest, std::path::PathBuf) {
    let socket = lab.directory.path().join("ours.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
    command.args(["vmm", "run", "--payload", "heartbeat", "--memory", "8MiB", "--vcpus", "1", "--working-set", "1MiB"]);
    command.args(["--uuid", &uuid(0).to_string(), "--socket"]).arg(&socket);
    let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let guest = Guest { process };
    until("our guest", || std::os::unix::net::UnixStream::connect(&socket).ok()).await;
    (guest, socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn garbled_kvm_state_is_refused_or_harmless() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: this machine has no /dev/kvm");
        return;
    }
    let lab = Lab::new();
    let mut gateway = lab.gateway(0).await;
    let evil = Evil::new(&lab, EVIL, &gateway);
    let (_guest, socket) = guest(&lab).await;
    let attach = || {
        let mut source = AttachedSource::attach(&socket, "ours", Timeouts::default()).unwrap();
        source.pause().unwrap();
        Box::new(source)
    };
    let state = attach().save_state().unwrap();
    let cut = |length: usize| state[..length].to_vec();
    let mut variants = vec![
        ("one byte".to_owned(), vec![0], true),
        ("zeroes".to_owned(), vec![0; state.len()], true),
        ("ones".to_owned(), vec![0xff; state.len()], true),
        ("half".to_owned(), cut(state.len() / 2), true),
        ("all but the last byte".to_owned(), cut(state.len() - 1), true),
        ("a byte more".to_owned(), [state.clone(), vec![0]].concat(), true),
        ("twice".to_owned(), [state.clone(), state.clone()].concat(), true),
        ("as it is".to_owned(), state.clone(), false),
    ];
    for part in 0..24 {
        let mut garbled = state.clone();
        let at = part * state.len() / 24;
        garbled[at..(at + 4).min(state.len())].iter_mut().for_each(|byte| *byte ^= 0xff);
        variants.push((format!("garbled at byte {at}"), garbled, false));
    }
    for (name, state, malformed) in variants {
        let mut attempt = evil.attempt_with(0, attach()).await;
        attempt.sent().await;
        attempt.state = state;
        attempt.send_state().await;
        let digest = attempt.digest();
        attempt.step(Handoff::Final { digest, lanes: LANES }).await;
        let prepared =
            matches!(attempt.hear(&name).await, Message::Handoff(signed) if matches!(signed.message.step, Handoff::Prepared { .. }));
        assert!(!(prepared && malformed), "{name}");
        assert!(prepared || name != "as it is", "{name}");
        if prepared {
            attempt.step(Handoff::Abort { class: ErrorClass::Cancelled }).await;
        }
        let (class, reason) = attempt.verdict(&name).await;
        assert_eq!(class, if prepared { ErrorClass::Cancelled } else { ErrorClass::Local }, "{name}: {reason}");
        let migration = attempt.migration();
        drop(attempt);
        gateway.recorded(&name, migration, class).await;
        gateway.is_well(&name, 0).await;
    }
    takes_an_honest_vm(&mut gateway, &evil, 9, 1).await;
}
