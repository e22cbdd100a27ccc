//! Parses the heads of HTTP/1.1 requests and writes answers. Pure functions, for any thread.

use std::time::SystemTime;

use super::fault::{Answer, first_header};
use crate::limits::loopback as limits;

/// The head of a request.
pub(super) struct Head {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    /// The length of the body. `None`: the head does not give it.
    pub(super) length: Option<usize>,
    /// Whether another request may follow on the connection.
    pub(super) keeps_alive: bool,
}

/// Parses a head, and returns it with its length in bytes. `None`: it is incomplete.
pub(super) fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, httparse::Error> {
    let mut headers = [httparse::EMPTY_HEADER; limits::REQUEST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(end) = request.parse(bytes)? else { return Ok(None) };
    let headers: Vec<(String, String)> = request
        .headers
        .iter()
        .map(|header| (header.name.to_owned(), String::from_utf8_lossy(header.value).into_owned()))
        .collect();
    let length = match (
        first_header(&headers, "transfer-encoding"),
        first_header(&headers, "content-length"),
    ) {
        (Some(_), _) => None,
        (None, None) => Some(0),
        (None, Some(length)) => {
            Some(length.trim().parse().map_err(|_| httparse::Error::HeaderValue)?)
        }
    };
    let closes = first_header(&headers, "connection")
        .is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let target = request.path.unwrap_or_default();
    let head = Head {
        method: request.method.unwrap_or_default().to_owned(),
        path: target.split('?').next().unwrap_or_default().to_owned(),
        headers,
        length,
        keeps_alive: !closes && request.version != Some(0),
    };
    Ok(Some((head, end)))
}

/// Encodes an answer, with the headers that uvicorn adds.
pub(super) fn encode(answer: &Answer) -> Vec<u8> {
    let date = httpdate::fmt_http_date(SystemTime::now());
    let mut head = format!(
        "HTTP/1.1 {} {}\r\ndate: {date}\r\nserver: uvicorn\r\n",
        answer.status,
        reason_phrase(answer.status)
    );
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let has_length = ["content-length", "transfer-encoding"]
        .iter()
        .any(|name| answer.first_header(name).is_some());
    if !has_length && answer.status >= 200 && !matches!(answer.status, 204 | 304) {
        head.push_str(&format!("content-length: {}\r\n", answer.body.len()));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(&answer.body);
    bytes
}

fn reason_phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        411 => "Length Required",
        413 => "Content Too Large",
        422 => "Unprocessable Content",
        425 => "Too Early",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "",
    }
}
