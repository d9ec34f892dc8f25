//! CNI by executing plugins.
