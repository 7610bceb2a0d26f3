addEventListener('DOMContentLoaded', () => {
  // The theme leaves the sidebar's head, with the site's name, outside of all that a screen reader can go to.
  const sidebar = document.querySelector('.bd-sidebar-primary');
  sidebar?.setAttribute('role', 'navigation');
  sidebar?.setAttribute('aria-label', 'site');
  // The empty corner of a table is the heading of nothing.
  for (const corner of document.querySelectorAll('thead th'))
    if (!corner.textContent.trim()) corner.replaceWith(document.createElement('td'));
});
