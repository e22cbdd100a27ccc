//! `decnet.ini` with any content.

use super::assert_sanitized;
use crate::credentials::enrolment::{Enrolment, EnrolmentSources};
use crate::error::{Error, chain};

/// A value at the end of the ini to which nothing refers. No error may contain such a value.
const SECRET: &str = "2bb80d537b1da3e38bd30361aa855686";

/// Variables of the environment, so that the other keys are read from the ini. After an invalid
/// key, the others would not be read.
const VARIABLES: [&[(&str, &str)]; 4] = [
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
    for variables in VARIABLES {
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
            assert_sanitized(enrolment.host_uuid().value());
            assert_sanitized(&enrolment.master_authority());
            assert_ne!(*enrolment.master_port().value(), 0);
            assert!(!enrolment.agent_dir().value().to_string_lossy().contains(char::is_control));
            for provenance in
                [enrolment.host_uuid().provenance(), enrolment.agent_dir().provenance()]
            {
                assert_sanitized(&provenance.to_string());
            }
        }
        Err(error) => {
            assert!(error.is_config() || error.is_not_enrolled());
            assert_sanitized(&error.to_string());
            assert_sanitized(&chain(&error));
        }
    }
}
