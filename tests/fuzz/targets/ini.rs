//! `decnet.ini`, whatever stands in it.

use super::assert_sayable;
use crate::credentials::enrolment::{Enrolment, EnrolmentSources};
use crate::error::{Error, chain};

/// Stands at the end of the ini, where nothing refers to it: of such values no error may speak.
const SECRET: &str = "2bb80d537b1da3e38bd30361aa855686";

/// What the environment says already, so that the ini is asked for the rest: where it is at fault with one key, the
/// others are not looked at.
const SAID: [&[(&str, &str)]; 4] = [
    &[],
    &[("DECNET_MODE", "agent")],
    &[("DECNET_SWARMCTL_PORT", "8770")],
    &[
        ("DECNET_SWARMCTL_PORT", "8770"),
        ("DECNET_HOST_UUID", "0c4f9a52"),
        ("DECNET_MASTER_HOST", "master.lan"),
    ],
];

/// Reads an enrolment from an ini with this content.
pub fn ini(input: &[u8]) {
    for variables in SAID {
        check(read(variables, input.to_vec()));
    }
    let with_secret = [input, b"\n[not read]\npassword = ", SECRET.as_bytes(), b"\n"].concat();
    if let Err(error) = read(&[], with_secret) {
        assert!(!format!("{error} {}", chain(&error)).contains(SECRET), "{error}");
    }
}

fn read(variables: &[(&str, &str)], content: Vec<u8>) -> Result<Enrolment, Error> {
    EnrolmentSources::from_variables(variables.iter().copied())
        .config("decnet.ini")
        .read_content(content)
}

fn check(read: Result<Enrolment, Error>) {
    match read {
        Ok(enrolment) => {
            assert_sayable(enrolment.host_uuid().value());
            assert_sayable(&enrolment.master_authority());
            assert_ne!(*enrolment.master_port().value(), 0);
            assert!(!enrolment.agent_dir().value().to_string_lossy().contains(char::is_control));
            for provenance in
                [enrolment.host_uuid().provenance(), enrolment.agent_dir().provenance()]
            {
                assert_sayable(&provenance.to_string());
            }
        }
        Err(error) => {
            assert!(error.is_config() || error.is_not_enrolled());
            assert_sayable(&error.to_string());
            assert_sayable(&chain(&error));
        }
    }
}
