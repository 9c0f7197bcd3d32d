//! Gateways have no private keys: processes of their own sign for them, and what becomes of a gateway when one of those ends.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ring::digest::{SHA512, digest};
use rustix::process::{Pid, Signal};

use crate::command::{PATIENCE, wait_for};
use crate::gateway::{A, B};
use crate::guest::Kind;
use crate::lab::{Lab, Setup};
use crate::relay::Conditions;

/// Everything that a process can write to and that has been touched.
fn memory(pid: Pid) -> Vec<u8> {
    let directory = format!("/proc/{}", pid.as_raw_nonzero());
    let maps = fs::read_to_string(format!("{directory}/maps")).unwrap();
    let memory = File::open(format!("{directory}/mem")).unwrap();
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" rw") && !line.contains("[v")) {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut page = [0; 4096];
        for at in (from..to).step_by(page.len()) {
            // What nobody has touched reads as zeros, which are no key.
            if memory.read_exact_at(&mut page, at).is_ok() && page.iter().any(|byte| *byte != 0) {
                found.extend_from_slice(&page);
            }
        }
    }
    found
}

/// Which of the needles are there, in one pass.
fn found(memory: &[u8], needles: &[Vec<u8>]) -> Vec<bool> {
    let mut begins = [false; 256];
    needles.iter().for_each(|needle| begins[usize::from(needle[0])] = true);
    let mut found = vec![false; needles.len()];
    for (at, byte) in memory.iter().enumerate() {
        if begins[usize::from(*byte)] {
            needles.iter().zip(&mut found).for_each(|(needle, found)| *found |= memory[at..].starts_with(needle));
        }
    }
    found
}

fn behind<'a>(der: &'a [u8], marker: &[u8]) -> &'a [u8] {
    let at = der.windows(marker.len()).position(|window| window == marker).expect("a key of this kind") + marker.len();
    &der[at..at + 32]
}

/// A P-256 key as ring keeps it: times 2^256, modulo the order of the group, from the last bits to the first.
fn montgomery(key: &[u8]) -> Vec<u8> {
    const ORDER: [u64; 4] = [0xf3b9_cac2_fc63_2551, 0xbce6_faad_a717_9e84, 0xffff_ffff_ffff_ffff, 0xffff_ffff_0000_0000];
    let mut limbs = [0_u64; 4];
    for (limb, bytes) in limbs.iter_mut().zip(key.rchunks(8)) {
        *limb = u64::from_be_bytes(bytes.try_into().unwrap());
    }
    for _ in 0..256 {
        let carry = limbs[3] >> 63;
        limbs = [limbs[0] << 1, limbs[1] << 1 | limbs[0] >> 63, limbs[2] << 1 | limbs[1] >> 63, limbs[3] << 1 | limbs[2] >> 63];
        let (mut less, mut borrow) = ([0; 4], false);
        for (index, limb) in limbs.iter().enumerate() {
            let (first, under) = limb.overflowing_sub(ORDER[index]);
            let (second, below) = first.overflowing_sub(u64::from(borrow));
            (less[index], borrow) = (second, under || below);
        }
        if carry == 1 || !borrow {
            limbs = less;
        }
    }
    limbs.iter().flat_map(|limb| limb.to_le_bytes()).collect()
}

/// What of a key would be found in memory: as it is, as it is written in its file, and as it is when it signs.
fn needles(path: &Path) -> Vec<Vec<u8>> {
    use rustls_pki_types::pem::PemObject;
    let text = fs::read_to_string(path).unwrap();
    let der = rustls_pki_types::PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).unwrap();
    let der = der.secret_pkcs8_der();
    // The key is in the middle of the first line, behind what all keys begin with.
    let written = text.lines().nth(1).unwrap().as_bytes()[24..60].to_vec();
    let (key, at_work) = if der.len() < 100 {
        let seed = behind(der, &[0x04, 0x22, 0x04, 0x20]);
        (seed, digest(&SHA512, seed).as_ref()[32..].to_vec())
    } else {
        let key = behind(der, &[0x02, 0x01, 0x01, 0x04, 0x20]);
        (key, montgomery(key))
    };
    vec![key.to_vec(), written, at_work]
}

#[test]
fn no_private_key_is_in_the_memory_of_a_gateway() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP only root looks into the memory of another user's, or of a closed, process");
        return;
    }
    let lab = Lab::start();
    lab.migrate(A, &[]).expect_moved();
    lab.gateway(A).reload();
    for name in [A, B] {
        let gateway = lab.gateway(name);
        let pid = Pid::from_raw(gateway.process_id().cast_signed()).unwrap();
        let (its, launcher) = (memory(pid), memory(gateway.companion("launcher")));
        let mut all = Vec::new();
        for (holder, file) in [("key", "key"), ("signing_key", "signing-key")] {
            let needles = needles(&lab.pki().join(format!("{}-{file}.pem", name.gateway())));
            let holder = memory(gateway.companion(holder));
            assert!(found(&holder, &needles)[2], "{file}: who signs with it has it, in the form that is looked for");
            all.extend(needles);
        }
        // Something is found that is there.
        all.push(format!("spiffe://{}", crate::lab::TRUST_DOMAIN).into_bytes());
        assert_eq!(found(&its, &all), [false, false, false, false, false, false, true], "{name:?}");
        assert_eq!(found(&launcher, &all)[..6], [false; 6], "{name:?}: the launcher");
    }
    lab.settled_on(B);
}

#[test]
fn who_holds_a_key_has_given_up_everything_else() {
    let lab = Setup::new().shape(|shape| shape.kind = Kind::Synthetic).start();
    for key in ["key", "signing_key"] {
        let pid = lab.gateway(A).companion(key);
        let directory = format!("/proc/{}", pid.as_raw_nonzero());
        let status = fs::read_to_string(format!("{directory}/status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap().to_owned();
        assert_eq!((field("NoNewPrivs"), field("Threads")), ("1".to_owned(), "1".to_owned()), "{key}");
        if lab.gateway(A).command(&["status"]).json()["gateway"]["sandbox"]["seccomp"] == true {
            assert_eq!(field("Seccomp"), "2", "{key}");
        } else {
            println!("SKIP this kernel does not filter system calls");
        }
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert!(field(set).bytes().all(|digit| digit == b'0'), "{key} {set}");
        }
        let limits = fs::read_to_string(format!("{directory}/limits")).unwrap();
        for (limit, most) in [("Max core file size", "0"), ("Max open files", "16")] {
            let line = limits.lines().find_map(|line| line.strip_prefix(limit)).unwrap();
            assert_eq!(line.split_whitespace().next(), Some(most), "{key}: {limit}");
        }
    }
}

#[test]
fn a_gateway_whose_tls_key_is_gone_says_so_and_what_runs_goes_on() {
    let mut lab = Setup::new().busy().start();
    let impaired = |lab: &Lab| lab.gateway(B).command(&["status"]).json()["gateway"]["impaired"].clone();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway(B).end_companion("key");
    wait_for("the gateway to notice", || impaired(&lab).as_str().filter(|why| why.contains("`identity.key` has ended")).map(str::to_owned));
    lab.gateway(B).audited("key-holder-ended", "failed", &["identity.key", "restart the gateway"]);
    assert!(lab.gateway(B).command(&["doctor"]).json()["checks"].to_string().contains("`identity.key` has ended"));
    // Its session and lanes are there.
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    running.finish().expect_moved();
    lab.runs_only_on(B);
    let said = lab.migrate(B, &[]);
    said.expect_stayed(said.code, &["did not sign"]);
    assert_ne!(said.code, 0);
    lab.gateway(B).command(&["reload"]).expect(1, &["has ended: restart the gateway"]);
    lab.gateway_mut(B).kill();
    lab.gateway_mut(B).start();
    assert!(impaired(&lab).is_null());
    lab.migrate(B, &[]).expect_moved();
    lab.settled_on(A);
}

#[test]
fn a_gateway_whose_signing_key_is_gone_lets_nothing_leave_and_goes_on_when_it_is_restarted() {
    let mut lab = Setup::new().busy().start();
    let impaired = |lab: &Lab| lab.gateway(A).command(&["status"]).json()["gateway"]["impaired"].clone();
    let (running, id) = lab.start_slow_migration(A, &[]);
    lab.gateway(A).end_companion("signing_key");
    wait_for("the gateway to notice", || impaired(&lab).as_str().filter(|why| why.contains("signing_key")).map(str::to_owned));
    lab.gateway(A).command(&["set", &id, "bandwidth=1GiB/s"]).expect(0, &[]);
    // What cannot be recorded does not happen.
    let said = running.finish();
    said.expect_stayed(said.code, &[]);
    assert_ne!(said.code, 0);
    lab.runs_only_on(A);
    let said = lab.migrate(A, &[]);
    said.expect_stayed(said.code, &["its checkpoint is not signed"]);
    lab.gateway_mut(A).kill();
    lab.gateway_mut(A).start();
    lab.migrate(A, &[]).expect_moved();
    lab.settled_on(B);
    for name in [A, B] {
        lab.gateway(name).audit_verifies();
    }
}

#[test]
fn a_signing_key_that_does_not_answer_for_a_while_delays_the_handoff_and_loses_nothing_of_it() {
    // Messages are on their way for long enough to stop somebody who waits for one.
    let link = Conditions { delay: Duration::from_millis(400), ..Conditions::default() };
    let lab = Setup::new().shape(|shape| shape.kind = Kind::Synthetic).through_relay(link).start();
    let holder = lab.gateway(B).companion("signing_key");
    let running = lab.start_migrate(A, &[]);
    let began = Instant::now();
    while !lab.gateway(A).audit_text().contains("\"record\":\"commit\"") {
        assert!(began.elapsed() < PATIENCE, "no COMMIT: {}", lab.gateway(A).log());
        std::thread::sleep(Duration::from_millis(1));
    }
    rustix::process::kill_process(holder, Signal::STOP).unwrap();
    wait_for("a signature that is late", || lab.gateway(B).log().contains("did not answer within").then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    rustix::process::kill_process(holder, Signal::CONT).unwrap();
    running.finish().expect_moved();
    assert!(!lab.gateway(A).log().contains("link lost"), "the handoff goes on in its session");
    // The guest did not wait for it.
    assert!(lab.gateway(B).log().contains("handoff record is not in the audit log"));
    lab.gateway(B).audited("handoff", "done", &["\"record\":\"run\""]);
    lab.settled_on(B);
}
