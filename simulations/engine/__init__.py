"""The run of a scenario: provisioning, the in-process grid, the personal step, the export, the progress display. This
package imports nothing, because its modules need torch and Flower."""
