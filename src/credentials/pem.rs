//! Parses PEM files strictly: no section is skipped silently. Pure functions, for any thread.
//!
//! The reader of rustls skips lines that it does not understand, so it loses a certificate after a
//! byte order mark or after an END on the same line. Here every BEGIN must start a section that can
//! be read; otherwise the file is an error. rustls still decodes the base64, in constant time for a
//! key.
//!
//! An error never quotes the file, as it may contain a key.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::master::x509::first_value;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What is wrong with a file. The caller adds its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) what: &'static str,
    pub(crate) remedy: &'static str,
}

/// The advice for a file that is damaged.
pub(super) const REPAIR: &str = "repair the file, or enrol this host again";

impl Problem {
    const fn of(what: &'static str) -> Self {
        Self { what, remedy: REPAIR }
    }

    const fn with(what: &'static str, remedy: &'static str) -> Self {
        Self { what, remedy }
    }
}

/// A decoded section.
#[derive(PartialEq, Eq)]
pub(crate) enum Section {
    Certificate(CertificateDer<'static>),
    PrivateKey(PrivateKeyDer<'static>),
    EncryptedKey,
    /// A section of a known type that is not used here.
    Other(&'static str),
}

/// The meaning of a section's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Label {
    Certificate,
    /// OpenSSL's format: a certificate, followed by trust settings.
    TrustedCertificate,
    PrivateKey(&'static str),
    EncryptedKey,
    /// It may contain certificates.
    Pkcs7,
    /// It may be a certificate with a misspelt label.
    Unknown,
    Other(&'static str),
}

impl Label {
    fn of(text: &[u8]) -> Self {
        match text {
            b"CERTIFICATE" | b"X509 CERTIFICATE" => Self::Certificate,
            b"TRUSTED CERTIFICATE" => Self::TrustedCertificate,
            b"PRIVATE KEY" => Self::PrivateKey("PRIVATE KEY"),
            b"RSA PRIVATE KEY" => Self::PrivateKey("RSA PRIVATE KEY"),
            b"EC PRIVATE KEY" => Self::PrivateKey("EC PRIVATE KEY"),
            b"ENCRYPTED PRIVATE KEY" => Self::EncryptedKey,
            b"OPENSSH PRIVATE KEY" => Self::Other("an OpenSSH key"),
            b"DSA PRIVATE KEY" => Self::Other("a DSA key"),
            b"PUBLIC KEY" | b"RSA PUBLIC KEY" => Self::Other("a public key"),
            b"CERTIFICATE REQUEST" | b"NEW CERTIFICATE REQUEST" => {
                Self::Other("a certificate request")
            }
            b"X509 CRL" => Self::Other("a revocation list"),
            b"EC PARAMETERS" | b"DH PARAMETERS" | b"X9.42 DH PARAMETERS" => {
                Self::Other("parameters")
            }
            b"PKCS7" | b"CMS" | b"PKCS #7 SIGNED DATA" => Self::Pkcs7,
            _ => Self::Unknown,
        }
    }
}

/// All sections of a file.
pub(crate) fn sections(content: &[u8]) -> Result<Vec<Section>, Problem> {
    check_is_text(content)?;
    let mut sections = Vec::new();
    let mut open: Option<Open<'_>> = None;
    for line in content.split(|byte| matches!(byte, b'\n' | b'\r')) {
        // Concatenated files may each have a byte order mark.
        let line = line.trim_ascii();
        let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        open = match (Line::of(line)?, open) {
            (Line::Begin(label), None) => Some(Open { text: label, lines: Vec::new() }),
            (Line::Begin(_), Some(_)) => {
                return Err(Problem::of("has a PEM section without an END line"));
            }
            (Line::End(label), Some(section)) if label == section.text => {
                sections.push(section.close()?);
                None
            }
            (Line::End(_), _) => return Err(Problem::of("has an END line without its BEGIN line")),
            (Line::Other, Some(mut section)) => {
                section.lines.push(line);
                Some(section)
            }
            // Text around sections, as openssl writes it.
            (Line::Other, None) => None,
        };
    }
    match open {
        None => Ok(sections),
        Some(_) => Err(Problem::of("ends in the middle of a PEM section")),
    }
}

/// Whether the file is empty or ends within a section, so that another process may still be writing
/// it. Zeros at the end, as after a crash, count as not written. Called only for a file that cannot
/// be used.
pub(crate) fn is_half_written(content: &[u8]) -> bool {
    const BEGIN: &[u8] = b"-----BEGIN ";
    const END: &[u8] = b"-----END ";
    let written = content.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let content = content.get(..written).unwrap_or_default();
    let mut lines: Vec<&[u8]> =
        content.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).collect();
    // The text after the last line break.
    let last = lines.pop().unwrap_or_default();
    let marker = lines.iter().rfind(|line| line.starts_with(BEGIN) || line.starts_with(END));
    let is_begun =
        |line: &[u8]| line.starts_with(BEGIN) || !line.is_empty() && BEGIN.starts_with(line);
    match marker {
        _ if content.trim_ascii().is_empty() => true,
        Some(marker) if marker.starts_with(BEGIN) => {
            !(last.starts_with(END) && last.ends_with(b"-----"))
        }
        _ => is_begun(last),
    }
}

/// Rejects DER and UTF-16, which have no lines that could be parsed.
fn check_is_text(content: &[u8]) -> Result<(), Problem> {
    match content {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'-', 0, ..] | [0, b'-', ..] => {
            Err(Problem::with("is UTF-16 text", "save it as ASCII or UTF-8"))
        }
        [0x30, 0x80..=0x84, ..] => Err(DER),
        // A short key.
        [0x30, ..] if first_value(content).is_some_and(|value| value.len() == content.len()) => {
            Err(DER)
        }
        // After a crash, a file that was not synced is all zeros.
        content if content.contains(&0) => Err(Problem::of("has zero bytes, so it is damaged")),
        _ => Ok(()),
    }
}

enum Line<'a> {
    Begin(&'a [u8]),
    End(&'a [u8]),
    Other,
}

impl<'a> Line<'a> {
    /// A damaged BEGIN or END line is an error, because it would hide a section.
    fn of(line: &'a [u8]) -> Result<Self, Problem> {
        let label = |prefix: &[u8]| {
            line.strip_prefix(prefix)?.strip_suffix(b"-----").filter(|label| is_label(label))
        };
        match (label(b"-----BEGIN "), label(b"-----END ")) {
            (Some(label), _) => Ok(Self::Begin(label)),
            (None, Some(label)) => Ok(Self::End(label)),
            (None, None) if is_marker(line) => Err(if has_two_sections(line) {
                Problem::with(
                    "has two PEM sections on one line",
                    "put a line break between the END and the BEGIN",
                )
            } else {
                Problem::with(
                    "has a damaged BEGIN or END line",
                    "write it on a line of its own, between two runs of five hyphens",
                )
            }),
            (None, None) => Ok(Self::Other),
        }
    }
}

fn is_label(label: &[u8]) -> bool {
    !label.is_empty()
        && !label.starts_with(b" ")
        && !label.ends_with(b" ")
        && !label.contains(&b'-')
}

/// Whether a line is a damaged BEGIN or END line: dashes, followed by BEGIN or END and a known
/// label. Other text between dashes, such as `--- Vendor certificate ---`, is a comment.
fn is_marker(line: &[u8]) -> bool {
    let text = String::from_utf8_lossy(line).to_ascii_uppercase();
    let mut dashes = 0;
    text.split(is_dash).skip(1).any(|piece| {
        dashes += 1;
        let is_marked = dashes >= 2
            && label_of(piece).is_some_and(|label| match label.as_str() {
                // `----- end -----` is a comment.
                "" => line.starts_with(b"-----BEGIN"),
                label => Label::of(label.as_bytes()) != Label::Unknown,
            });
        dashes = if piece.is_empty() { dashes } else { 0 };
        is_marked
    })
}

/// Whether `c` is a hyphen, or a dash that a word processor replaced it with.
fn is_dash(c: char) -> bool {
    matches!(c, '-' | '\u{2010}'..='\u{2015}' | '\u{2212}')
}

/// The label after BEGIN or END, with single spaces between its words.
fn label_of(piece: &str) -> Option<String> {
    let piece = piece.trim_start();
    let label = piece.strip_prefix("BEGIN").or_else(|| piece.strip_prefix("END"))?;
    Some(label.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Whether a line has an END followed by a BEGIN.
fn has_two_sections(line: &[u8]) -> bool {
    let end = find(line, b"-----END ");
    end.zip(find(line, b"-----BEGIN ")).is_some_and(|(end, begin)| end < begin)
}

fn find(line: &[u8], part: &[u8]) -> Option<usize> {
    line.windows(part.len()).position(|window| window == part)
}

/// A section whose END line was not read yet.
struct Open<'a> {
    text: &'a [u8],
    lines: Vec<&'a [u8]>,
}

impl Open<'_> {
    fn close(self) -> Result<Section, Problem> {
        // Headers end with an empty line (RFC 1421). Only the one about encryption matters.
        let encrypted = self
            .lines
            .iter()
            .any(|line| line.starts_with(b"Proc-Type:") && find(line, b"ENCRYPTED").is_some());
        match Label::of(self.text) {
            Label::Pkcs7 => Err(Problem::with(
                "has a PKCS#7 section",
                "convert it with openssl pkcs7 -print_certs",
            )),
            Label::Unknown => {
                Err(Problem::with("has a PEM section of an unknown type", "remove the section"))
            }
            Label::Other(name) => Ok(Section::Other(name)),
            Label::EncryptedKey => Ok(Section::EncryptedKey),
            Label::PrivateKey(_) if encrypted => Ok(Section::EncryptedKey),
            Label::Certificate => Ok(Section::Certificate(self.decode("CERTIFICATE")?)),
            Label::TrustedCertificate => {
                let der: CertificateDer<'_> = self.decode("CERTIFICATE")?;
                let certificate = first_value(&der)
                    .ok_or(Problem::of("has a TRUSTED CERTIFICATE that holds no certificate"))?;
                Ok(Section::Certificate(certificate.to_vec().into()))
            }
            Label::PrivateKey(label) => Ok(Section::PrivateKey(self.decode(label)?)),
        }
    }

    /// Decodes the section as text that rustls can parse.
    fn decode<T: PemObject>(&self, label: &str) -> Result<T, Problem> {
        let begin = format!("-----BEGIN {label}-----\n");
        let end = format!("\n-----END {label}-----\n");
        let text = [begin.as_bytes(), &self.lines.join(&b'\n'), end.as_bytes()].concat();
        T::from_pem_slice(&text).map_err(|_| NOT_BASE64)
    }
}

const DER: Problem = Problem::with(
    "is DER or PKCS#12, not PEM",
    "convert it with openssl, or enrol this host again",
);

const NOT_BASE64: Problem = Problem::of("has a PEM section that is not base64");

#[cfg(test)]
mod tests {
    use super::*;

    /// Valid base64 of a DER value.
    const BODY: &str = "MAMBAf8=";
    const DER: &[u8] = &[0x30, 0x03, 0x01, 0x01, 0xff];

    fn section(label: &str) -> String {
        format!("-----BEGIN {label}-----\n{BODY}\n-----END {label}-----\n")
    }

    fn kinds(content: &[u8]) -> Vec<&'static str> {
        let kind = |section: &Section| match section {
            Section::Certificate(der) if der.as_ref() == DER => "certificate",
            Section::Certificate(_) => "another certificate",
            Section::PrivateKey(_) => "key",
            Section::EncryptedKey => "encrypted",
            Section::Other(name) => name,
        };
        sections(content).unwrap().iter().map(kind).collect()
    }

    fn problem(content: &[u8]) -> &'static str {
        match sections(content) {
            Ok(_) => panic!("{:?}", String::from_utf8_lossy(content)),
            Err(problem) => problem.what,
        }
    }

    #[test]
    fn every_certificate_is_found_with_any_line_ends() {
        let one = section("CERTIFICATE");
        let two = section("CERTIFICATE").repeat(2);
        for text in [
            two.clone(),
            two.replace('\n', "\r\n"),
            two.replace('\n', "\r"),
            two.replace('\n', "  \n\t"),
            two.trim_end().to_owned(),
            format!("\u{feff}{two}"),
            format!("{one}\u{feff}{one}"),
            format!(
                "Certificate:\n    Data: END of it -- or the BEGIN\n{one}text -- between\n\n{one}# the end"
            ),
            format!("{}{}", section("TRUSTED CERTIFICATE"), section("X509 CERTIFICATE")),
        ] {
            assert_eq!(kinds(text.as_bytes()), ["certificate"; 2], "{text:?}");
        }
    }

    #[test]
    fn text_with_dashes_around_sections_is_a_comment() {
        let one = section("CERTIFICATE");
        for text in [
            "# ----- appended by ansible -----",
            "# --- Vendor certificate ---",
            "-------- Backend CA --------",
            "# ---- calendar 2026 ----",
            "subject=CN = xn--legende-certs",
            "        Subject: O=DECNET, CN=back-end--endcert key",
            "# The master\u{2019}s CA: send new certificates to ops",
            "# ----- BEGIN ANSIBLE MANAGED BLOCK -----",
            "--- end of the vendor's certificates ---",
            "----- end -----",
            "----- END KEYS -----",
        ] {
            assert_eq!(
                kinds(format!("{text}\n{one}{text}\n{one}{text}").as_bytes()),
                ["certificate"; 2],
                "{text}"
            );
        }
    }

    #[test]
    fn trust_settings_after_a_trusted_certificate_are_ignored() {
        // The certificate, followed by another value.
        let text = "-----BEGIN TRUSTED CERTIFICATE-----\nMAMBAf8wAwEBAA==\n-----END TRUSTED CERTIFICATE-----\n";
        assert_eq!(kinds(text.as_bytes()), ["certificate"]);
        let plain = text.replace("TRUSTED ", "");
        assert_eq!(kinds(plain.as_bytes()), ["another certificate"]);
    }

    #[test]
    fn section_that_would_be_skipped_is_an_error() {
        let one = section("CERTIFICATE");
        let glued = format!("{}{one}", one.trim_end());
        assert_eq!(problem(glued.as_bytes()), "has two PEM sections on one line");
        assert_eq!(
            problem(format!("{} {one}", one.trim_end()).as_bytes()),
            "has two PEM sections on one line"
        );
        for begin in [
            "----BEGIN CERTIFICATE-----",
            "-----BEGIN CERTIFICATE----",
            "-----BEGIN CERTIFICATE------",
            "---BEGIN CERTIFICATE---",
            "-----BEGINCERTIFICATE-----",
            "----- BEGIN CERTIFICATE -----",
            "-----begin certificate-----",
            "-----BEGIN  CERTIFICATE-----",
            "-----BEGIN CERTIFICATE----- ca",
            "> -----BEGIN CERTIFICATE-----",
            "\u{2013}\u{2013}BEGIN CERTIFICATE\u{2013}\u{2013}",
            "\u{2014}\u{2014}-BEGIN CERTIFICATE\u{2014}\u{2014}-",
            "# -----BEGIN CERTIFICATE-----",
            "-----BEGIN CERTIFICATE",
            "---- BEGIN RSA PRIVATE KEY ----",
            "-----BEGIN -----",
        ] {
            let text = one.clone() + &one.replace("-----BEGIN CERTIFICATE-----", begin);
            assert_eq!(problem(text.as_bytes()), "has a damaged BEGIN or END line", "{begin}");
        }
        for (text, what) in [
            (
                one.replace("-----BEGIN CERTIFICATE-----\n", ""),
                "has an END line without its BEGIN line",
            ),
            (one.replace("END CERT", "END TRUSTED CERT"), "has an END line without its BEGIN line"),
            (one.replace("-----END CERTIFICATE-----\n", ""), "ends in the middle of a PEM section"),
            (
                one.replace("-----END CERTIFICATE-----\n", "") + &one,
                "has a PEM section without an END line",
            ),
            (one.clone() + &section("CERTIFCATE"), "has a PEM section of an unknown type"),
            (one.clone() + &section("PKCS7"), "has a PKCS#7 section"),
            (one.replace(BODY, "????"), "has a PEM section that is not base64"),
        ] {
            assert_eq!(problem(text.as_bytes()), what, "{text}");
        }
    }

    #[test]
    fn binary_formats_are_named_in_the_error() {
        let one = section("CERTIFICATE");
        let wide =
            |order: fn(u16) -> [u8; 2]| one.encode_utf16().flat_map(order).collect::<Vec<u8>>();
        for content in [
            [&b"\xff\xfe"[..], &wide(u16::to_le_bytes)].concat(),
            [&b"\xfe\xff"[..], &wide(u16::to_be_bytes)].concat(),
            wide(u16::to_le_bytes),
            wide(u16::to_be_bytes),
        ] {
            assert_eq!(problem(&content), "is UTF-16 text");
        }
        assert_eq!(problem(&[0; 64]), "has zero bytes, so it is damaged");
        assert_eq!(
            problem(&[one.as_bytes(), &[0; 64]].concat()),
            "has zero bytes, so it is damaged"
        );
        // A long value, and a short one with zero bytes, as a key of Ed25519 or P-256 may be.
        for der in [&b"\x30\x82\x01\x00\x00"[..], &[&b"\x30\x2e"[..], &[0; 46]].concat()] {
            assert_eq!(problem(der), "is DER or PKCS#12, not PEM");
        }
    }

    #[test]
    fn keys_encrypted_keys_and_other_sections_are_distinguished() {
        let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nMAMBAf8=\n\
                   -----END RSA PRIVATE KEY-----\n";
        assert_eq!(kinds(old.as_bytes()), ["encrypted"]);
        assert_eq!(kinds(section("ENCRYPTED PRIVATE KEY").as_bytes()), ["encrypted"]);
        for label in ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"] {
            assert_eq!(kinds(section(label).as_bytes()), ["key"]);
        }
        let both = section("EC PARAMETERS") + &section("EC PRIVATE KEY");
        assert_eq!(kinds(both.as_bytes()), ["parameters", "key"]);
        assert_eq!(kinds(section("OPENSSH PRIVATE KEY").as_bytes()), ["an OpenSSH key"]);
    }
}
