//! `sealane bench`.

use super::*;

/// Zero pages, repetitive ones and noise.
fn image(dir: &Path, pages: usize) {
    let mut noise = 1_u64;
    let mut bytes = vec![0; pages * 4096];
    for (number, page) in bytes.chunks_exact_mut(4096).enumerate() {
        for (at, byte) in page.iter_mut().enumerate() {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = match number / 50 % 3 {
                0 => 0,
                1 => (at / 64).to_le_bytes()[0],
                _ => noise.to_be_bytes()[0],
            };
        }
    }
    std::fs::write(dir.join("ram.img"), bytes).unwrap();
}

#[test]
fn bench_moves_an_image_and_reports_the_median() {
    let dir = here();
    image(dir.path(), 4096);
    let bench = sealane(dir.path(), "bench --image ram.img --rounds 2 --compress lz4 --json");
    let bench = bench.says(0, &["warm-up", "compared: equal", "run 2 of 2", "GiB/s"]);
    let object = bench.json();
    assert_eq!((object["schema"].as_str(), object["link"].as_str()), (Some("sealane.bench/1"), Some("loopback")));
    assert_eq!((object["image_bytes"].as_u64(), object["compression"].as_str()), (Some(16 << 20), Some("lz4")));
    assert_eq!((object["warm_up_verified"].as_bool(), object["durations_seconds"].as_array().unwrap().len()), (Some(true), 2));
    assert!(object["gib_per_second"].as_f64().unwrap() > 0.0 && object["cpu_seconds"].is_f64());
    let report = &object["report"];
    assert_eq!((report["schema"].as_str(), report["state"].as_str()), (Some("sealane.report/1"), Some("completed")));
    assert_eq!((report["running_on"].as_str(), report["verified"].as_bool()), (Some("destination"), Some(false)));
    let pages = |kind: &str| report["pages"][kind].as_u64().unwrap();
    assert_eq!(pages("zero") + pages("raw") + pages("compressed") + pages("duplicate"), 4096, "{report}");
    assert!(pages("zero") > 1300 && pages("duplicate") > 1000 && pages("raw") > 100, "{report}");
    assert!((5 << 20..12 << 20).contains(&report["wire_bytes"].as_u64().unwrap()), "{report}");
    assert!(report["audit"]["source_head"].as_str().unwrap().contains("spiffe://bench.sealane/gateway/source"));
}

#[test]
fn bench_verifies_when_asked_and_can_leave_pages_as_they_are() {
    let dir = here();
    image(dir.path(), 600);
    let object = sealane(dir.path(), "bench --image ram.img --rounds 1 --lanes 3 --compress none --verify --json").says(0, &[]).json();
    assert_eq!((object["report"]["verified"].as_bool(), object["lanes"].as_u64()), (Some(true), Some(3)));
    assert_eq!(object["report"]["pages"]["compressed"].as_u64(), Some(0));
    sealane(dir.path(), "bench --image ram.img --rounds 1").says(0, &["ram.img: 2.3 MiB at", "median of 1 runs"]);
}

#[test]
fn bench_refuses_what_is_no_image_and_leaves_nothing_behind() {
    let dir = here();
    sealane(dir.path(), "bench --image none").says(2, &["`none`"]);
    std::fs::write(dir.path().join("odd.img"), [1; 5000]).unwrap();
    let scratch = dir.path().join("tmp");
    std::fs::create_dir(&scratch).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
    let output = command.args(["bench", "--image", "odd.img"]).current_dir(dir.path()).env("TMPDIR", &scratch).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("`odd.img`"), "{output:?}");
    assert_eq!(scratch.read_dir().unwrap().count(), 0, "keys are removed");
}

#[test]
fn bench_generates_the_memory_when_asked() {
    let dir = here();
    let bench = |flags: &str| {
        sealane(dir.path(), &format!("bench --memory 16MiB --rounds 1 --compress lz4 --json --content {flags}")).says(0, &[]).json()
    };
    let object = bench("realistic --verify");
    assert_eq!((object["content"]["kind"].as_str(), object["content"]["seed"].as_u64()), (Some("realistic"), Some(1)));
    assert_eq!((object["image"].is_null(), object["image_bytes"].as_u64()), (true, Some(16 << 20)));
    let pages = |object: &Value, kind: &str| object["report"]["pages"][kind].as_u64().unwrap();
    assert!((800..2400).contains(&pages(&object, "zero")), "{object}");
    assert!((2 << 20..7 << 20).contains(&object["report"]["wire_bytes"].as_u64().unwrap()), "{object}");
    let again = bench("realistic");
    assert_eq!(pages(&again, "zero"), pages(&object, "zero"), "the seed decides");
    assert_eq!(pages(&bench("zero"), "zero"), 4096);
    assert_eq!(pages(&bench("incompressible"), "raw"), 4096);
    let heavy = bench("write-heavy --dirty-rate 20MiB/s --verify");
    assert_eq!(heavy["content"]["dirty_bytes_per_second"].as_u64(), Some(20 << 20));
    assert_eq!(heavy["report"]["verified"].as_bool(), Some(true), "what was written meanwhile arrived");
}

#[test]
fn bench_wants_an_image_or_content_and_says_what_does_not_fit() {
    let dir = here();
    image(dir.path(), 16);
    for (flags, words) in [
        ("", ["--image", "--content"]),
        ("--image ram.img --content zero", ["cannot be used with", "--content"]),
        ("--image ram.img --memory 1GiB", ["cannot be used with", "--image"]),
        ("--content zero --memory 5", ["hint:", "5"]),
        ("--content zero --memory 5000B", ["5000", "multiple of 4096"]),
        ("--content zero --dirty-rate 1MiB/s", ["`zero`", "write-heavy"]),
        ("--content zero --to 127.0.0.1:1", ["--pki", "required"]),
        ("--content zero --memory 1MiB --to 127.0.0.1:1 --pki none", ["`source`", "bench listen --pki none"]),
        ("listen --at 127.0.0.1:0", ["--pki", "required"]),
        ("listen --at localhost --pki ca", ["--at", "localhost"]),
    ] {
        sealane(dir.path(), &format!("bench {flags}")).says(2, &words);
    }
}

/// `bench listen` in a process of its own.
struct Listener {
    process: std::process::Child,
    address: String,
}

impl Listener {
    fn start(dir: &Path, flags: &str) -> Self {
        let line = format!("bench listen --at 127.0.0.1:0 --pki ca {flags}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealane"));
        let piped = std::process::Stdio::piped;
        let mut process = command.args(line.split_whitespace()).current_dir(dir).stdout(piped()).stderr(piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        let line = lines.find(|line| line.starts_with("listening at ")).unwrap();
        // Whatever it says later has somewhere to go.
        std::thread::spawn(move || lines.count());
        let address = line["listening at ".len()..].split(';').next().unwrap().to_owned();
        Self { process, address }
    }

    /// Ends it as an operator does: its exit code, and what it printed on stdout.
    fn end(mut self) -> (i32, String) {
        Command::new("kill").args(["-INT", &self.process.id().to_string()]).status().unwrap();
        let mut stdout = String::new();
        self.process.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
        (self.process.wait().unwrap().code().unwrap(), stdout)
    }
}

#[test]
fn bench_runs_between_two_processes_and_each_says_its_own_cpu_time() {
    let dir = here();
    let listener = Listener::start(dir.path(), "--json");
    let to = format!("--to {} --pki ca --rounds 2 --json", listener.address);
    let object = sealane(dir.path(), &format!("bench --content realistic --memory 8MiB {to}")).says(0, &["compared: equal"]).json();
    assert_eq!((object["link"].as_str(), object["cpu_of"].as_str()), (Some(listener.address.as_str()), Some("source")));
    assert!(object["report"]["cpu_seconds"].is_null() && object["cpu_seconds"].is_f64(), "{object}");
    // The next source, with other memory, finds the same listener.
    sealane(dir.path(), &format!("bench --content zero --memory 4MiB {to}")).says(0, &["compared: equal"]);
    let (code, stdout) = listener.end();
    assert_eq!(code, 0);
    let arrivals: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(arrivals.len(), 6, "{stdout}");
    let ids: Vec<_> = object["timed_runs"].as_array().unwrap().iter().map(|run| &run["migration_id"]).collect();
    assert_eq!(ids, [&arrivals[1]["migration_id"], &arrivals[2]["migration_id"]]);
    for arrival in &arrivals {
        assert_eq!((arrival["schema"].as_str(), arrival["arrived"].as_bool()), (Some("sealane.bench-arrival/1"), Some(true)), "{arrival}");
    }
}

#[test]
fn bench_listen_refuses_what_is_too_large_and_who_is_not_the_source() {
    let dir = here();
    let listener = Listener::start(dir.path(), "--max-memory 1MiB");
    let to = format!("bench --content zero --memory 2MiB --rounds 1 --to {}", listener.address);
    let ran = sealane(dir.path(), &format!("{to} --pki ca"));
    assert!(ran.code != 0 && ran.stderr.contains("--max-memory"), "{}{}", ran.stdout, ran.stderr);
    sealane(dir.path(), "pki init other --trust-domain other.example.net").says(0, &[]);
    sealane(dir.path(), "pki issue other --gateway source --site x").says(0, &[]);
    sealane(dir.path(), &format!("{to} --pki other")).says(3, &[]);
    assert_eq!(listener.end().1, "");
}
