//! Tests against the real master and a real Docker Engine.

mod enrolment;
mod support;
