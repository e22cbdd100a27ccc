//! The time to write a body, by the number of deckies. The floors: serde_json writes the same
//! value, and the bytes are copied.

use std::hint::black_box;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use decnet_heartbeat::benching::Bodies;
use serde_json::{Value, json};

use crate::table::{Amount, Figures, Goal, Line, percentile};

const SIZES: [usize; 4] = [10, 100, 1_000, 10_000];
pub const SERVICES: [&str; 5] = ["ssh", "http", "smb_share", "ftp", "mysql"];

/// The number of deckies that are written for each size, so that each size takes about as long.
const WRITTEN: usize = 400_000;

/// A state file that changed less than three seconds ago is read each time, because a second change
/// may not be visible in its times.
const UNCHANGED: Duration = Duration::from_secs(5);

pub fn measure() -> Result<Figures, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = |deckies: usize| folder.path().join(format!("{deckies}.json"));
    SIZES.iter().for_each(|deckies| {
        std::fs::write(path(*deckies), state(*deckies, &SERVICES).to_string()).unwrap()
    });
    thread::sleep(UNCHANGED);
    let sizes: Vec<Size> =
        SIZES.iter().map(|deckies| Size::measure(*deckies, &path(*deckies))).collect();
    let [fewest, .., most] = sizes.as_slice() else { unreachable!("there are four") };
    let growth = |time: fn(&Size) -> Duration| {
        let each = |size: &Size| time(size).as_secs_f64() / size.deckies as f64;
        Amount::Count(each(most) / each(fewest))
    };
    let mut lines: Vec<Line> = sizes.iter().flat_map(Size::lines).collect();
    lines.push(Line {
        what: format!(
            "growth of the time per decky, {} to {}; floor: serde_json's",
            fewest.deckies, most.deckies
        ),
        floor: Some(growth(|size| size.written)),
        measured: growth(|size| size.ours),
        goal: Goal::AtMostTimes(1.5),
    });
    Ok(lines.into())
}

/// The median times for a number of deckies.
struct Size {
    deckies: usize,
    ours: Duration,
    written: Duration,
    copied: Duration,
}

impl Size {
    fn measure(deckies: usize, state_file: &Path) -> Self {
        let mut bodies = Bodies::new(state_file, containers(deckies));
        let bytes = bodies.write().unwrap();
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["status"]["deckies"].as_array().unwrap().len(), deckies);
        assert_eq!(value["status"]["runtime"]["decky-1"]["running"], true);
        let mut ours = Vec::new();
        let mut written = Vec::new();
        let mut copied = Vec::new();
        for _ in 0..WRITTEN / deckies {
            ours.push(time(|| bodies.write().unwrap()));
            written.push(time(|| serde_json::to_vec(&value).unwrap()));
            copied.push(time(|| bytes.clone()));
        }
        let [ours, written, copied] = [ours, written, copied].map(|times| percentile(&times, 50));
        Self { deckies, ours, written, copied }
    }

    fn lines(&self) -> [Line; 2] {
        let line = |floor: &str, time, goal| Line {
            what: format!("body of {} deckies, five containers each; floor: {floor}", self.deckies),
            floor: Some(Amount::Time(time)),
            measured: Amount::Time(self.ours),
            goal,
        };
        [
            line("serde_json writing it", self.written, Goal::AtMostTimes(1.5)),
            line("copying its bytes", self.copied, Goal::None),
        ]
    }
}

fn time<T>(work: impl FnOnce() -> T) -> Duration {
    let since = Instant::now();
    black_box(work());
    since.elapsed()
}

/// A state file of DECNET with this number of deckies, each with these services.
pub fn state(deckies: usize, services: &[&str]) -> Value {
    let decky = |number: usize| {
        json!({
            "name": format!("decky-{number}"), "ip": format!("10.0.{}.{}", number / 250, number % 250 + 1),
            "services": services, "distro": "debian", "base_image": "debian:bookworm-slim",
            "build_base": "debian:bookworm-slim", "hostname": format!("SRV-FINANCE-{number}"), "archetype": null,
            "service_config": {"ssh": {"banner": "OpenSSH_9.2p1 Debian-2+deb12u3"}, "http": {"server": "nginx/1.22.1"}},
            "nmap_os": "linux", "mutate_interval": 1800, "last_mutated": 1_700_000_000.5, "host_uuid": null,
        })
    };
    let deckies: Vec<Value> = (1..=deckies).map(decky).collect();
    json!({
        "config": {"mode": "swarm", "interface": "eth0", "subnet": "10.0.0.0/16", "gateway": "10.0.0.1",
                   "deckies": deckies, "log_file": null, "ipvlan": false, "mutate_interval": 30},
        "compose_path": "/opt/decnet/decnet-compose.yml",
    })
}

fn containers(deckies: usize) -> Vec<(String, String)> {
    let of =
        |decky: usize| SERVICES.map(|service| (container(decky, service), "running".to_owned()));
    (1..=deckies).flat_map(of).collect()
}

pub fn container(decky: usize, service: &str) -> String {
    format!("decky-{decky}-{}", service.replace('_', "-"))
}
