addEventListener('DOMContentLoaded', () => {
  // The theme leaves the sidebar's head, with the site's name, outside of all that a screen reader can go to.
  const sidebar = document.querySelector('.bd-sidebar-primary');
  sidebar?.setAttribute('role', 'navigation');
  sidebar?.setAttribute('aria-label', 'site');
  // The empty corner of a table is the heading of nothing.
  for (const corner of document.querySelectorAll('thead th'))
    if (!corner.textContent.trim()) corner.replaceWith(document.createElement('td'));
  // Names in narrow columns are broken between their words.
  for (const name of document.querySelectorAll('td :is(a, span)'))
    if (!name.childElementCount) name.innerHTML = name.innerHTML.replace(/[_.](?=\w)/g, '$&<wbr>');
});
addEventListener('load', () => {
  // On a phone these are moved sideways rather than made too small to read.
  for (const image of document.querySelectorAll('article img')) image.classList.toggle('wide', image.naturalWidth > 800);
});
